"""Contrastive losses of image and text vectors, dense or in a ring of devices.

Neither is a sum over rows: each row's loss depends on all other rows. So plain
gradient accumulation computes another loss; the objective refuses it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from research.typing import Array, Bool, Float, Int

MAX_SCALE = 100.0
"""CLIP clips its scale to this after each update (Radford et al. 2021)."""


def same_pairs(ids: Int[Array, "B"]) -> Bool[Array, "B B"]:
  """Returns which texts describe which images, by the number of the caption.

  Several rows of a batch may have one caption; they are no negatives of each
  other.

  Args:
    ids: the same for equal captions, -1 for padded rows.
  """
  return (ids[:, None] == ids[None]) & (ids[:, None] >= 0)


def clip_loss(
  images: Float[Array, "B E"],
  texts: Float[Array, "B E"],
  scale: Float[Array, ""],
  ids: Int[Array, "B"] | None = None,
) -> Float[Array, ""]:
  """Returns CLIP's loss: the mean of both directions' cross-entropies.

  Radford et al. 2021, arXiv:2103.00020, figure 3. With equal captions the
  target is uniform over them.

  Args:
    images, texts: unit vectors, row i of one belongs to row i of the other.
    scale: of their products.
    ids: numbers of the captions, -1 for padding; None if all differ.
  """
  ids = jnp.arange(len(images)) if ids is None else ids
  pairs, real = same_pairs(ids), ids >= 0
  logits = scale * images @ texts.T
  logits = jnp.where(real[:, None] & real[None], logits, -1e9)
  target = pairs / jnp.maximum(pairs.sum(axis=-1, keepdims=True), 1)

  def cross_entropy(logits):
    losses = -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)
    return jnp.sum(losses * real) / jnp.maximum(real.sum(), 1)

  return (cross_entropy(logits) + cross_entropy(logits.T)) / 2


def siglip_loss(
  images: Float[Array, "B E"],
  texts: Float[Array, "B E"],
  scale: Float[Array, ""],
  bias: Float[Array, ""],
  ids: Int[Array, "B"] | None = None,
) -> Float[Array, ""]:
  """Returns SigLIP's loss: every pair is a yes or no question.

  Zhai et al. 2023, arXiv:2303.15343, equation 1: the sum over pairs, divided by
  the number of images.

  Args:
    images, texts, scale, ids: as for `clip_loss`.
    bias: added to the products.
  """
  ids = jnp.arange(len(images)) if ids is None else ids
  total = _siglip_sum(images, texts, scale, bias, ids, ids)
  return total / jnp.maximum(jnp.sum(ids >= 0), 1)


def _siglip_sum(images, texts, scale, bias, of_images, of_texts):
  pairs = of_images[:, None] == of_texts[None]
  real = (of_images >= 0)[:, None] & (of_texts >= 0)[None]
  logits = scale * images @ texts.T + bias
  signed = jnp.where(pairs, logits, -logits)
  return -jnp.sum(jax.nn.log_sigmoid(signed) * real)


def siglip_ring_loss(
  images: Float[Array, "B E"],
  texts: Float[Array, "B E"],
  scale: Float[Array, ""],
  bias: Float[Array, ""],
  ids: Int[Array, "B"],
  axes: str | Sequence[str],
) -> Float[Array, ""]:
  """Returns `siglip_loss` of a batch cut over devices; for `jax.shard_map`.

  Texts go round the devices, so that a device has `(B / devices)^2` products at
  a time, not `B^2` (section 3.3 of the paper).

  Args:
    images, texts, ids: this device's rows.
    scale, bias: as for `siglip_loss`; the same on all devices.
    axes: the mesh axis or axes that cut the batch.
  """
  count = jax.lax.axis_size(axes)
  ring = [(i, (i + 1) % count) for i in range(count)]

  def hop(carry, _):
    total, texts, of_texts = carry
    total += _siglip_sum(images, texts, scale, bias, ids, of_texts)
    passed = jax.lax.ppermute((texts, of_texts), axes, ring)
    return (total, *passed), None

  start = jax.lax.pcast(jnp.zeros(()), axes, to="varying")
  (total, _, _), _ = jax.lax.scan(hop, (start, texts, ids), None, length=count)
  rows = jax.lax.psum(jnp.sum(ids >= 0), axes)
  return jax.lax.psum(total, axes) / jnp.maximum(rows, 1)


def clipped_scale(log_scale: Float[Array, ""]) -> Float[Array, ""]:
  """Returns the logarithm of a scale that is at most `MAX_SCALE`."""
  return jnp.minimum(log_scale, jnp.log(MAX_SCALE))
