"""BLIP-2's three losses: contrast, matching with hard negatives, captions.

Li et al. 2023, arXiv:2301.12597, section 3.2; the weights of the sum are 1, and
labels are smoothed as in the authors' code (LAVIS).
"""

import dataclasses

import jax
import jax.numpy as jnp

from research import weights
from research.optim import ranges
from research.training.objectives.objective import (
  Batch,
  Objective,
  Sums,
  WholeBatch,
)
from research.typing import (
  Array,
  Bool,
  Float,
  Int,
  Params,
  PRNGKey,
  UserError,
)
from research.vlm.bootstrapping.model import ImageTextModel
from research.vlm.contrastive.losses import same_pairs
from research.vlm.encoders import vit
from research.vlm.encoders.vit import Features, VisionTransformer
from research.vlm.images.normalise import CLIP, Normalisation
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.model import ANY_SIZE

FLOOR = 1e-4
"""Added to every negative's probability, as in LAVIS."""


@dataclasses.dataclass(frozen=True)
class ImageText(WholeBatch):
  """The sum of three losses, each a mean over the batch.

  A batch has `features`, float [B, N, C], of the images; `tokens` and
  `segments`, int32 [B, T], of their texts, -1 for padding in the latter; and
  optionally `ids`, int32 [B], equal for equal texts, which are no negatives of
  each other. Rows of padding count nowhere.

  Attributes:
    model: the network.
    smoothing: of the labels of contrast and captions.
  """

  model: ImageTextModel | None = None
  smoothing: float | int = 0.1

  def __post_init__(self):
    ranges.share("ImageText", smoothing=self.smoothing)

  def __call__(self, params: Params, batch: Batch, key: PRNGKey | None) -> Sums:
    """Returns the sums of the loss over rows, and of its three parts.

    Without a key the negatives are the hardest ones, not samples.
    """
    dropout, sampling = (None, None) if key is None else jax.random.split(key)
    params = {"params": weights.bind(params, key=dropout)}
    valid = batch["segments"] >= 0
    rows = valid.any(axis=-1)
    ids = jnp.where(rows, batch.get("ids", jnp.arange(len(rows))), -1)
    features, tokens = batch["features"], batch["tokens"]
    pair = features, tokens, valid
    *vectors, temperature = self.model.apply(params, *pair, method="vectors")
    products = similarity(*vectors) / temperature
    losses = {"contrast": contrast(products, ids, self.smoothing)}
    losses["matching"] = self._matching(params, pair, products, ids, sampling)
    logits = self.model.apply(params, *pair, method="captions")
    losses["captions"] = caption_loss(logits, tokens, valid, self.smoothing)
    count = rows.sum().astype(jnp.float32)
    sums = {name: loss * count for name, loss in losses.items()}
    return sum(sums.values()), count, sums

  def _matching(self, params, pair, products, ids, key):
    features, tokens, valid = pair
    images, texts = hard_negatives(products, ids, key)
    logits = self.model.apply(
      params,
      jnp.concatenate([features, features[images], features]),
      jnp.concatenate([tokens, tokens, tokens[texts]]),
      jnp.concatenate([valid, valid, valid[texts]]),
      method="match",
    )
    real = (ids >= 0).astype(jnp.float32)
    negative = real * negatives(ids).any(axis=-1)
    some = jnp.concatenate([real, negative, negative])
    log_p = jax.nn.log_softmax(logits)
    log_p = jnp.where(
      jnp.arange(len(some)) < len(ids), log_p[:, 1], log_p[:, 0]
    )
    return -jnp.sum(log_p * some) / jnp.maximum(some.sum(), 1)


@dataclasses.dataclass(frozen=True)
class FromPixels(WholeBatch):
  """An objective of images' features, which an encoder makes of pixels.

  Parameters are `vision`, the encoder's, which BLIP-2 leaves frozen, and
  `image_text`, the objective's. A batch has `pixels`, uint8 [B, V, H, W, 3], of
  which the first view counts, in the place of `features`.

  Attributes:
    vision: the encoder.
    objective: of features and texts.
    features: which activations. BLIP-2's encoder has lost its last layer, so
      its features are the last ones there are.
    normalise: of the pixels.
  """

  vision: VisionTransformer
  objective: Objective
  features: Features = Features(class_token=True)
  normalise: Normalisation = CLIP

  def check_preprocessor(self, preprocessor: Preprocessor) -> None:
    """Checks that training sees the pixels that evaluations see.

    Args:
      preprocessor: of the model.

    Raises:
      UserError: it normalises otherwise, or its views are not of the encoder.
    """
    preprocessor.check_normalise("FromPixels", self.normalise)
    preprocessor.check_one_view("FromPixels: preprocessor")
    if preprocessor.tiling.native_square is not None:
      raise UserError(
        "FromPixels: preprocessor: found the tiling"
        f" {type(preprocessor.tiling).__name__}, which keeps each image's size,"
        " expected views of one size, such as of tilings.Square"
      )
    vit.check_grid(self.vision, *preprocessor.plan(*ANY_SIZE).view)

  def __call__(self, params: Params, batch: Batch, key: PRNGKey | None) -> Sums:
    """Returns the sums of the objective."""
    patches, at = vit.view_patches(
      self.vision, batch["pixels"][:, 0], self.normalise
    )
    features = self.vision.apply(
      {"params": params["vision"]},
      patches,
      at,
      None,
      self.features,
    )
    text = {k: x for k, x in batch.items() if k != "pixels"}
    return self.objective(
      params["image_text"], text | {"features": features}, key
    )


def similarity(
  images: Float[Array, "B Q E"], texts: Float[Array, "C E"]
) -> Float[Array, "B C"]:
  """Returns each text's product with the image's best query."""
  return jnp.einsum("bqe,ce->bcq", images, texts).max(axis=-1)


def negatives(ids: Int[Array, "B"]) -> Bool[Array, "B B"]:
  """Returns which texts describe other images; `ids` as for `same_pairs`."""
  real = ids >= 0
  return real[:, None] & real[None] & ~same_pairs(ids)


def contrast(
  products: Float[Array, "B B"], ids: Int[Array, "B"], smoothing: float
) -> Float[Array, ""]:
  """Returns the mean of both directions' cross-entropies.

  Args:
    products: of images (rows) and texts, divided by the temperature.
    ids: numbers of the texts, -1 for padding.
    smoothing: share of the target that is uniform over all texts.
  """
  pairs, real = same_pairs(ids), ids >= 0
  target = pairs / jnp.maximum(pairs.sum(axis=-1, keepdims=True), 1)
  target = (1 - smoothing) * target + smoothing * real / jnp.maximum(
    real.sum(), 1
  )
  logits = jnp.where(real[:, None] & real[None], products, -1e9)

  def cross_entropy(logits):
    losses = -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)
    return jnp.sum(losses * real) / jnp.maximum(real.sum(), 1)

  return (cross_entropy(logits) + cross_entropy(logits.T)) / 2


def hard_negatives(
  products: Float[Array, "B B"], ids: Int[Array, "B"], key: PRNGKey | None
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
  """Returns an image of another text for each text, and a text for each image.

  They are drawn by the softmax of their similarity over the batch, plus
  `FLOOR`, without a gradient.

  Args:
    products, ids: as for `contrast`.
    key: of the draws; None for the most similar ones.
  """
  products, allowed = jax.lax.stop_gradient(products), negatives(ids)
  keys = (None, None) if key is None else jax.random.split(key)

  def draw(products, key):
    products = jnp.where((ids >= 0)[None], products, -1e9)
    p = jnp.where(allowed, jax.nn.softmax(products) + FLOOR, 0)
    if key is None:
      return jnp.argmax(p, axis=-1)
    return jax.random.categorical(key, jnp.log(p))

  return draw(products.T, keys[0]), draw(products, keys[1])


def caption_loss(
  logits: Float[Array, "B T V"],
  tokens: Int[Array, "B T"],
  valid: Bool[Array, "B T"],
  smoothing: float,
) -> Float[Array, ""]:
  """Returns the mean cross-entropy of all tokens but the first.

  Args:
    logits: each token's, of the next one.
    tokens, valid: as for `ImageTextModel.vectors`.
    smoothing: share of the target that is uniform over the vocabulary.
  """
  log_p = jax.nn.log_softmax(logits[:, :-1])
  target, real = tokens[:, 1:, None], valid[:, 1:].astype(jnp.float32)
  right = jnp.take_along_axis(log_p, target, axis=-1)[..., 0]
  losses = -(1 - smoothing) * right - smoothing * log_p.mean(axis=-1)
  return jnp.sum(losses * real) / jnp.maximum(real.sum(), 1)
