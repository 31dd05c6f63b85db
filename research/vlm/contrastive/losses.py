"""Contrastive losses of image and text vectors, dense or in chunks on devices.

Neither is a sum over rows: each row's loss depends on all other rows. So plain
gradient accumulation computes another loss; the objective refuses it.

Functions with `axes` are for `jax.shard_map` over a batch of B rows in equal
parts of b rows. SigLIP's loss passes texts around the devices, so that a device
has b x b products at a time. CLIP's gathers the vectors, and a device has its
own rows of both directions' products, b x B.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from research.typing import Array, Bool, Float, Int

MAX_SCALE = 100.0
"""CLIP clips its scale to this after each update (Radford et al. 2021)."""


Axes = str | Sequence[str]
"""The mesh axis or axes that divide the rows of a batch."""


def same_pairs(
  ids: Int[Array, "B"], others: Int[Array, " C"] | None = None
) -> Bool[Array, "B C"]:
  """Returns which texts describe which images, by the number of the caption.

  Several rows of a batch may have one caption; they are no negatives of each
  other.

  Args:
    ids: the same for equal captions, -1 for padded rows.
    others: of the other rows; None for the same ones.
  """
  others = ids if others is None else others
  return (ids[:, None] == others[None]) & (ids[:, None] >= 0)


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
    ids: numbers of the captions, -1 for padding; None if all differ.
  """
  ids = jnp.arange(len(images)) if ids is None else ids
  logits, rows = scale * images @ texts.T, jnp.maximum(jnp.sum(ids >= 0), 1)
  sums = [_cross_entropies(x, ids, ids) for x in (logits, logits.T)]
  return (sums[0] / rows + sums[1] / rows) / 2


def _cross_entropies(logits, ids, others):
  """Returns the sum over rows of cross-entropies; padding is in none."""
  pairs, real = same_pairs(ids, others), ids >= 0
  logits = jnp.where(real[:, None] & (others >= 0)[None], logits, -1e9)
  target = pairs / jnp.maximum(pairs.sum(axis=-1, keepdims=True), 1)
  return -jnp.sum(jnp.sum(target * jax.nn.log_softmax(logits), -1) * real)


def clip_gathered_loss(
  images: Float[Array, "B E"],
  texts: Float[Array, "B E"],
  scale: Float[Array, ""],
  ids: Int[Array, "B"],
  axes: Axes,
) -> Float[Array, ""]:
  """Returns `clip_loss` of a batch divided over devices; for `jax.shard_map`.

  Each device compares its images with all texts, and its texts with all images.

  Args:
    images, texts, ids: this device's rows.
    scale: factor of their products; the same on all devices.
  """
  rows = (images, texts, ids)
  all_images, all_texts, others = jax.lax.all_gather(rows, axes, tiled=True)
  total = _cross_entropies(scale * images @ all_texts.T, ids, others)
  total += _cross_entropies(scale * texts @ all_images.T, ids, others)
  count = jax.lax.psum(jnp.sum(ids >= 0), axes)
  return jax.lax.psum(total, axes) / (2 * jnp.maximum(count, 1))


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
    images, texts, ids: as for `clip_loss`.
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
  axes: Axes,
) -> Float[Array, ""]:
  """Returns `siglip_loss` of a batch divided over devices; for `jax.shard_map`.

  Texts go around the devices, so that a device has `(B / devices)^2` products
  at a time, not `B^2` (section 3.3 of the paper).

  Args:
    images, texts, ids: this device's rows.
    scale, bias: factor of their products, and what is added to them; the same
      on all devices.
  """
  # Varying here, so that their gradients are summed over devices once.
  scale, bias = jax.lax.pcast((scale, bias), axes, to="varying")

  def compare(texts, of_texts):
    return _siglip_sum(images, texts, scale, bias, ids, of_texts)

  total = _around(compare, jnp.add, (texts, ids), axes)
  rows = jax.lax.psum(jnp.sum(ids >= 0), axes)
  return jax.lax.psum(total, axes) / jnp.maximum(rows, 1)


def _around(
  compare: Callable[..., Any],
  combine: Callable[[Any, Any], Any],
  part: Any,
  axes: Axes,
) -> Any:
  count = jax.lax.axis_size(axes)
  ring = [(i, (i + 1) % count) for i in range(count)]
  # Stored for the gradient, the products of all hops would be b x B.
  compare = jax.checkpoint(compare, prevent_cse=False)

  def hop(carry, _):
    total, part = carry
    part = jax.lax.ppermute(part, axes, ring)
    return (combine(total, compare(*part)), part), None

  start = compare(*part), part
  (total, _), _ = jax.lax.scan(hop, start, None, length=count - 1)
  return total


def caption_hits(
  images: Float[Array, "B E"],
  texts: Float[Array, "B E"],
  ids: Int[Array, "B"],
  axes: Axes = (),
) -> Float[Array, ""]:
  """Returns how many images have their caption as the most similar text.

  The first text counts where several are as similar. There is no gradient.

  Args:
    images, texts, ids: as for `clip_loss`; under `jax.shard_map` this device's
      rows.
    axes: the mesh axes that divide the batch; none where all rows are here.
  """
  images, texts = jax.lax.stop_gradient((images, texts))

  def compare(texts, ids, rows):
    similar = jnp.where(ids[None] >= 0, images @ texts.T, -jnp.inf)
    best = jnp.argmax(similar, axis=-1)
    return jnp.max(similar, axis=-1), ids[best], rows[best]

  def combine(old, new):
    better = (new[0] > old[0]) | ((new[0] == old[0]) & (new[2] < old[2]))
    return tuple(jnp.where(better, y, x) for x, y in zip(old, new, strict=True))

  rows = jnp.arange(len(ids))
  if axes:
    rows += jax.lax.axis_index(axes) * len(ids)
    _, best, _ = _around(compare, combine, (texts, ids, rows), axes)
  else:
    _, best, _ = compare(texts, ids, rows)
  hits = jnp.sum((best == ids) & (ids >= 0)).astype(jnp.float32)
  return jax.lax.psum(hits, axes) if axes else hits


def clipped_scale(log_scale: Float[Array, ""]) -> Float[Array, ""]:
  """Returns the logarithm of a scale that is at most `MAX_SCALE`."""
  return jnp.minimum(log_scale, jnp.log(MAX_SCALE))
