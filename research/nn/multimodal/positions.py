"""Rotary positions of tokens among which there are images: M-RoPE.

Wang et al. 2024, Qwen2-VL (arXiv:2409.12191), section 2.1. A text token has one
position, three times. The tokens of an image share their time and have its rows
and columns, and the text after it continues behind its longer side. So
positions are fewer than the slots of a cache, by a number that differs from row
to row; a generated token's position is its slot plus this row's offset.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from research import weights
from research.nn.rope import Axes
from research.nn.stack import Stack
from research.nn.transformer import Transformer
from research.typing import Array, Int, UserError


def rope_index(
  tokens: Int[Array, "B T"],
  grids: Int[Array, "B V 2"],
  token: int,
  segments: Int[Array, "B T"] | None = None,
) -> tuple[Int[Array, "B T 3"], Int[Array, "B"]]:
  """Returns each token's time, row and column, and each row's offset.

  Args:
    tokens: right-padded rows; padding is negative.
    grids: rows and columns of soft tokens of each row's images, in order; zeros
      for none. The i-th placeholder of a row belongs to the image in which the
      i-th soft token lies, so that images may follow each other without text
      between.
    token: id of the placeholder.
    segments: the document of each token, if a row has several: positions
      restart in each.

  Returns:
    The coordinates, and what is added to a slot after the row's last token to
    get its position (`get_rope_index` of transformers calls it the delta).
  """
  here = tokens == token
  before = jnp.cumsum(here, axis=1) - here
  sizes = grids[..., 0] * grids[..., 1]
  ends = jnp.cumsum(sizes, axis=1)
  sides = jnp.cumsum(jnp.max(grids, axis=-1), axis=1)
  sides = jnp.pad(sides, ((0, 0), (1, 0)))

  def reached(count):
    """Returns the number of images that are complete, and their extent."""
    images = jnp.sum(ends[:, None] <= count[..., None], axis=-1)
    return images, jnp.take_along_axis(sides, images, axis=1)

  images, extent = reached(before)
  start = jnp.arange(tokens.shape[1]) - before + extent
  image = jnp.minimum(images, grids.shape[1] - 1)
  inside = before - jnp.take_along_axis(ends - sizes, image, axis=1)
  columns = jnp.take_along_axis(grids[..., 1], image, axis=1)
  row, column = jnp.divmod(inside, jnp.maximum(columns, 1))
  within = jnp.stack([jnp.zeros_like(row), row, column], axis=-1)
  if segments is not None:
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    start = start - jax.lax.cummax(jnp.where(begins, start, 0), axis=1)
  found = start[..., None] + jnp.where(here[..., None], within, 0)
  total = jnp.sum(here, axis=1, keepdims=True)
  return found.astype(jnp.int32), (reached(total)[1] - total)[:, 0]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("grids", "positions", "offset", "padding"),
  meta_fields=("token",),
)
@dataclasses.dataclass(frozen=True)
class ImagePositions(weights.Weight):
  """The images of a batch, as far as they move the positions of its tokens.

  It stands in the parameter tree as `rotary`, since objectives, samplers and
  caches pass parameters on and need not know: a `Transformer` that finds it
  there rotates by its coordinates. `with_tokens` computes them of complete
  rows.

  Attributes:
    grids: `[B, V, 2]`, see `rope_index`.
    token: id of the placeholder.
    positions: `[B, T, 3]`, or None before `with_tokens`.
    offset: `[B]`, of the tokens after these, or None before `with_tokens`.
    padding: `[B]`, places before a row's first token, or None before
      `with_tokens`.
  """

  per_row = True

  grids: Any
  token: int
  positions: Any = None
  offset: Any = None
  padding: Any = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Returns the shape of the grids."""
    return self.grids.shape

  @property
  def dtype(self) -> Any:
    """Returns the grids' dtype."""
    return self.grids.dtype

  def dense(self) -> Int[Array, "B V 2"]:
    """Returns the grids."""
    return self.grids

  def axes(self, names: tuple[str | None, ...]) -> "ImagePositions":
    """Returns the logical axis names of its arrays."""
    del names
    return dataclasses.replace(
      self,
      grids=("batch", None, None),
      positions=("batch", None, None),
      offset=("batch",),
      padding=("batch",),
    )

  def count(self) -> int:
    """Returns 0: these are no parameters."""
    return 0

  @property
  def row_count(self) -> int:
    """Returns the number of rows."""
    return self.grids.shape[0]

  def take_rows(self, rows: Int[Array, " N"]) -> "ImagePositions":
    """Returns the images of chosen rows, and their positions if known."""
    return jax.tree.map(lambda x: x[rows], self)

  def with_tokens(
    self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None
  ) -> "ImagePositions":
    """Returns the positions of these tokens, and of those after them."""
    found, offset = rope_index(tokens, self.grids, self.token, segments)
    padding = jnp.argmax(tokens >= 0, axis=1)
    return dataclasses.replace(
      self, positions=found, offset=offset, padding=padding
    )

  def of_row(self, length: int) -> Int[Array, "B T 3"]:
    """Returns the coordinates of the `length` tokens of complete rows.

    Raises:
      UserError: `with_tokens` has not been called, or with other tokens.
    """
    found = self._known()
    if found.shape[1] != length:
      raise UserError(
        f"rotary positions: found {length} tokens, expected the"
        f" {found.shape[1]} that weights.with_tokens was called with"
      )
    return found

  def of_slots(self, slots: Int[Array, "B T"]) -> Int[Array, "B T 3"]:
    """Returns the coordinates of tokens by their slots in a cache.

    Args:
      slots: places in their row, from 0 at its first token; negative for
        padding. Those behind the tokens of `with_tokens` have that row's
        offset.

    Raises:
      UserError: `with_tokens` has not been called.
    """
    known = self._known()
    place = slots + self.padding[:, None]
    index = jnp.clip(place, 0, known.shape[1] - 1)
    found = jnp.take_along_axis(known, index[..., None], axis=1)
    after = (place + self.offset[:, None])[..., None]
    return jnp.where((place < known.shape[1])[..., None], found, after)

  def _known(self):
    if self.positions is None:
      raise UserError(
        "rotary positions: the positions of images are not set; call"
        " weights.with_tokens(params, tokens) before the model"
      )
    return self.positions


def with_axes(model: Transformer, axes: Axes | None) -> Transformer:
  """Returns a language model whose layers rotate by these coordinates."""

  def changed(block):
    attention = block.attention
    rope = dataclasses.replace(attention.rope, axes=axes)
    return block.clone(attention=attention.clone(rope=rope))

  blocks = tuple(map(changed, model.stack.blocks))
  return model.clone(stack=Stack(model.stack.depth, blocks))
