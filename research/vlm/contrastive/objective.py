"""The contrastive objective: a batch of images against its texts."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from research import sharding, tree, weights
from research.training.objectives.objective import Batch, Sums, WholeBatch
from research.typing import Array, Params, PRNGKey
from research.vlm.contrastive import losses
from research.vlm.contrastive.dual_encoder import DualEncoder
from research.vlm.encoders import native
from research.vlm.images.normalise import HALF, Normalisation
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.objective import images_of

Loss = Callable[..., Array]
"""`loss(images, texts, scale, bias, ids)` of unit vectors. With `axes=...`, the
rows are one device's of a batch that these mesh axes divide."""


def softmax(
  images: Array,
  texts: Array,
  scale: Array,
  bias: Array,
  ids: Array,
  axes: losses.Axes = (),
) -> Array:
  """Returns CLIP's loss, which has no bias; see `losses.clip_loss`."""
  del bias
  if axes:
    return losses.clip_gathered_loss(images, texts, scale, ids, axes)
  return losses.clip_loss(images, texts, scale, ids)


def sigmoid(
  images: Array,
  texts: Array,
  scale: Array,
  bias: Array,
  ids: Array,
  axes: losses.Axes = (),
) -> Array:
  """Returns SigLIP's loss; see `losses.siglip_loss`."""
  if axes:
    return losses.siglip_ring_loss(images, texts, scale, bias, ids, axes)
  return losses.siglip_loss(images, texts, scale, bias, ids)


@dataclasses.dataclass(frozen=True)
class Contrastive(WholeBatch):
  """Images and captions, each row against all others.

  A batch has `pixels`, uint8 [B, V, H, W, 3], of which the first view counts,
  or `patches` and `grids` of native resolution (`Patches`); `captions`, int32
  [B, T]; and `ids`, int32 [B], equal for equal captions and -1 for padding.

  Attributes:
    model: the experiment sets it after loading.
    loss: `softmax` (CLIP) or `sigmoid` (SigLIP).
    chunked: where a mesh divides the rows of a batch, each device computes its
      part of the loss, so that none has the B x B products. If false, XLA
      partitions the loss of all rows; a `loss` without `axes` needs this.
  """

  model: DualEncoder | None = None
  loss: Loss = sigmoid
  normalise: Normalisation = HALF
  chunked: bool = True

  def check_preprocessor(self, preprocessor: Preprocessor) -> None:
    """Checks that training sees the pixels that evaluations see.

    Args:
      preprocessor: of the model, whose normalisation those use.

    Raises:
      UserError: it normalises otherwise.
    """
    preprocessor.check_normalise("Contrastive", self.normalise)

  def constrain(self, trainable: Params) -> Params:
    """Returns trained parameters, CLIP's scale at most `losses.MAX_SCALE`.

    A model with a bias is SigLIP's, whose scale has no limit.
    """
    if self.model.bias is not None:
      return trainable
    return tree.map_paths(
      lambda path, x: losses.clipped_scale(x) if path == "logit_scale" else x,
      trainable,
    )

  def __call__(self, params: Params, batch: Batch, key: PRNGKey | None) -> Sums:
    """Returns the loss times the number of real rows, and that number.

    The metric `accuracy` is how often a caption of the image is the most
    similar text.
    """
    params = weights.bind(params, key=key)
    patches, at = native.encoder_inputs(
      images_of(batch), self.normalise, self.model.image
    )
    images, texts, scale, bias = self.model.apply(
      {"params": params}, patches, at, batch["captions"]
    )
    ids = batch["ids"]
    real = (ids >= 0).sum().astype(jnp.float32)
    found, hits = self.compare(images, texts, scale, bias, ids)
    return found * real, real, {"accuracy": hits}

  def compare(
    self, images: Array, texts: Array, scale: Array, bias: Array, ids: Array
  ) -> tuple[Array, Array]:
    """Returns the loss, and how many images find their caption.

    Args:
      images, texts: unit vectors, [B, E].
      scale, bias: factor of their products, and what is added to them.
      ids: numbers of the captions, [B], -1 for padding.
    """
    rows = sharding.activation_axes(ids.shape, "batch")[0]
    if not rows or not self.chunked:
      found = self.loss(images, texts, scale, bias, ids)
      return found, losses.caption_hits(images, texts, ids)

    def local(images, texts, scale, bias, ids):
      found = self.loss(images, texts, scale, bias, ids, axes=rows)
      return found, losses.caption_hits(images, texts, ids, rows)

    cut, whole = PartitionSpec(rows), PartitionSpec()
    return jax.shard_map(
      local, in_specs=(cut, cut, whole, whole, cut), out_specs=whole
    )(images, texts, scale, bias, ids)
