"""The contrastive objective: a batch of images against its texts."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from research import tree, weights
from research.training.objectives.objective import Batch, Sums, WholeBatch
from research.typing import Array, Params, PRNGKey
from research.vlm.contrastive import losses
from research.vlm.contrastive.dual_encoder import DualEncoder
from research.vlm.encoders import native
from research.vlm.images.normalise import HALF, Normalisation
from research.vlm.objective import images_of

Loss = Callable[[Array, Array, Array, Array, Array], Array]
"""`loss(images, texts, scale, bias, ids)` of unit vectors."""


def softmax(
  images: Array, texts: Array, scale: Array, bias: Array, ids: Array
) -> Array:
  """Returns CLIP's loss, which has no bias; see `losses.clip_loss`."""
  del bias
  return losses.clip_loss(images, texts, scale, ids)


def sigmoid(
  images: Array, texts: Array, scale: Array, bias: Array, ids: Array
) -> Array:
  """Returns SigLIP's loss; see `losses.siglip_loss`."""
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
    normalise: of the pixels.
  """

  model: DualEncoder | None = None
  loss: Loss = sigmoid
  normalise: Normalisation = HALF

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
    found = self.loss(images, texts, scale, bias, ids)
    similar = jnp.where(ids[None] >= 0, images @ texts.T, -jnp.inf)
    best = ids[jnp.argmax(jax.lax.stop_gradient(similar), axis=-1)]
    hits = jnp.sum((best == ids) & (ids >= 0)).astype(jnp.float32)
    return found * real, real, {"accuracy": hits}
