"""GGUF's 4, 5 and 8 bit blocks as a weight: never decoded as a whole.

Every product decodes the matrix it needs, next to where it is used, and the
backward pass decodes it again (as QLoRA does, Dettmers et al. 2023,
arXiv:2305.14314, section 3): what lives between is the blocks alone.

A block is 32 weights along the columns of a ggml matrix `[O, I]`: `scale *
(code - zero)`, or `scale * code + offset`. In memory the rows `O` come last
and a block's codes before them, so that decoding, which repeats each scale 32
times, runs along whole vectors:

  codes [..., X, 16, O], scale and offset [..., X, O], where I = 32 X

The logical weight is `[I, O]` (axis -2 is blocked: a linear layer), or its
transpose `[O, I]` (axis -1: an embedding `[V, D]`); products with the latter
swap letters instead of moving numbers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import weights
from research.interop import gguf_types, unread
from research.quant import products
from research.typing import Array, Float, Int, PRNGKey

BLOCK = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockTensor:
  """A matrix in ggml's blocks; frozen: no gradient reaches its parts.

  Attributes:
    codes: uint8 `[..., X, 16, O]`, low nibbles the block's first 16 codes,
      high nibbles the others; int8 `[..., X, 32, O]` for 8 bits.
    scale: float16 `[..., X, O]`.
    offset: float16 `[..., X, O]`, or None where codes have a zero instead.
    high: uint8 `[..., X, 4, O]`, bit `j` the fifth bit of code `j`; or None.
    kind: ggml's name of the type.
    axis: which logical axis is blocked, -2 or -1.
  """

  codes: Any
  scale: Any
  offset: Any = None
  high: Any = None
  kind: str = dataclasses.field(default="Q4_1", metadata=dict(static=True))
  axis: int = dataclasses.field(default=-2, metadata=dict(static=True))

  @property
  def shape(self) -> tuple[int, ...]:
    stored = (self.columns, self.rows)
    return self.scale.shape[:-2] + stored[:: 1 if self.axis == -2 else -1]

  @property
  def columns(self) -> int:
    """Returns `I` of the stored matrix."""
    return self.scale.shape[-2] * BLOCK

  @property
  def rows(self) -> int:
    """Returns `O` of the stored matrix."""
    return self.scale.shape[-1]

  @property
  def ndim(self) -> int:
    return len(self.scale.shape)

  @property
  def dtype(self) -> Any:
    return np.dtype(np.float32)

  def dense(self) -> Float[Array, "..."]:
    """Returns the float32 matrix, bitwise what ggml decodes to."""
    stored = self.stored()
    return stored if self.axis == -2 else jnp.swapaxes(stored, -1, -2)

  def stored(self) -> Float[Array, "... I O"]:
    """Returns the decoded numbers in the order they are stored in."""
    codes = self.codes_apart().astype(jnp.float32)
    values = codes - gguf_types.TYPES[self.kind].zero
    values *= self.scale.astype(jnp.float32)[..., None, :]
    if self.offset is not None:
      # The product of 5 and 11 bits is exact, so fusing them changes nothing.
      values += self.offset.astype(jnp.float32)[..., None, :]
    *lead, x, _, rows = values.shape
    return values.reshape(*lead, x * BLOCK, rows)

  def codes_apart(self) -> Array:
    """Returns the codes `[..., X, 32, O]`."""
    if self.codes.dtype == jnp.int8:
      return self.codes
    codes = jnp.concatenate([self.codes & 15, self.codes >> 4], axis=-2)
    if self.high is None:
      return codes
    shifts = jnp.arange(8, dtype=jnp.uint8)[:, None]
    bits = (self.high[..., None, :] >> shifts) & 1
    return codes | bits.reshape(codes.shape) << 4

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `einsum(eq, x, w)` over either axis, in the dtype of `x`."""
    left, w, out = eq.replace("->", ",").split(",")
    if self.axis == -1:
      w = w[:-2] + w[-1] + w[-2]
    if left[:-1] == out[:-1] and sorted((left[-1], out[-1])) == sorted(w):
      return products.matmul(x, self, transposed=left[-1] == w[1])
    stored = f"{left},{w}->{out}"
    return products.linear(lambda x, w: jnp.einsum(stored, x, w), x, self)

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns rows of an embedding, float32; only those are decoded."""
    if self.axis == -2:
      return jnp.take(self.dense(), ids, axis=0)
    flat = ids.reshape(-1)
    rows = jax.tree.map(lambda part: jnp.take(part, flat, axis=-1), self)
    return rows.dense().reshape(*ids.shape, self.shape[-1])

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    """Returns each row of `x` times its expert's matrix."""
    return products.ragged_dot(x, self, sizes, self.axis)

  def axes(self, names: tuple[str | None, ...]) -> "BlockTensor":
    """Blocks keep the name of the axis they cut; codes in one have none."""
    *lead, first, second = names
    x, rows = (first, second) if self.axis == -2 else (second, first)
    scale, codes = (*lead, x, rows), (*lead, x, None, rows)

    # A part may be None: in the trainable half of a tree all of them are.
    def part(name, names):
      return weights.axes(getattr(self, name), names)

    return dataclasses.replace(
      self,
      codes=part("codes", codes),
      scale=part("scale", scale),
      offset=part("offset", scale),
      high=part("high", codes),
    )

  def bind(
    self, *, key: PRNGKey | None, ids: Int[Array, "B"] | None
  ) -> "BlockTensor":
    """Returns itself: nothing here depends on the batch."""
    return self

  def squeeze(self) -> "BlockTensor":
    """Returns itself without a leading axis of one."""
    return jax.tree.map(lambda part: part.reshape(part.shape[1:]), self)


def packs(kind: str, shape: Sequence[int]) -> bool:
  """Whether a tensor of ggml type `kind` can be kept as a `BlockTensor`."""
  return len(shape) == 2 and gguf_types.TYPES[kind].bits is not None


def from_ggml(
  kind: str, matrices: Sequence[np.ndarray], axis: int
) -> BlockTensor:
  """Returns matrices of one type behind a leading axis, `[n, ...]`.

  Args:
    kind: ggml's name of the type, one that `packs`.
    matrices: blocks of each, uint8 `[rows, bytes of a row]`.
    axis: -2 if ggml's rows are the logical columns (`[in, out]` from
      `[out, in]`), -1 if they are the logical rows (an embedding).
  """
  size = gguf_types.TYPES[kind].nbytes

  def reader(matrix):
    return lambda r, x: matrix[r, x.start * size : x.stop * size]

  shape = (len(matrices[0]), matrices[0].shape[1] // size)
  readers = [reader(matrix) for matrix in matrices]
  return unread.place(from_ggml_unread(kind, readers, shape, axis))


def from_ggml_unread(
  kind: str,
  matrices: Sequence[Callable[[slice, slice], np.ndarray]],
  shape: tuple[int, int],
  axis: int,
) -> BlockTensor:
  """Returns matrices as `from_ggml` does, of `unread.Unread` arrays.

  A part of one reads the rows and, in them, the blocks that it needs.

  Args:
    kind: ggml's name of the type, one that `packs`.
    matrices: each returns, of some of its rows, some of the blocks, uint8
      `[rows, bytes]`.
    shape: of each matrix, `[rows, blocks of a row]`.
    axis: as for `from_ggml`.
  """
  ggml = gguf_types.TYPES[kind]
  rows, columns = shape
  empty = gguf_types.split(ggml, np.zeros((1, ggml.nbytes), np.uint8))

  def leaf(name: str) -> unread.Unread | None:
    found = getattr(empty, name)
    if found is None:
      return None

    def filler(matrix) -> unread.Fill:
      def fill(index, out):
        x, *inner, chosen = index
        part = getattr(gguf_types.split(ggml, matrix(chosen, x)), name)
        out[...] = np.moveaxis(part, 0, -1)[:, *inner]

      return fill

    return unread.stacked(
      [filler(matrix) for matrix in matrices],
      (len(matrices),),
      (columns, *found.shape[2:], rows),
      found.dtype,
    )

  return BlockTensor(
    leaf("codes"), leaf("scale"), leaf("offset"), leaf("high"), kind, axis
  )


def to_ggml(w: BlockTensor) -> np.ndarray:
  """Returns the blocks as ggml stores them, uint8 `[..., rows, bytes]`.

  Args:
    w: any leaf; byte for byte what it was made from.
  """
  *lead, x, rows = w.scale.shape

  def part(stored: Any) -> np.ndarray | None:
    if stored is None:
      return None
    stored = np.moveaxis(np.asarray(stored), -1, len(lead))
    return stored.reshape(-1, x, *stored.shape[len(lead) + 2 :])

  parts = gguf_types.Parts(
    part(w.codes), part(w.high), part(w.scale), part(w.offset)
  )
  raw = gguf_types.join(gguf_types.TYPES[w.kind], parts)
  return raw.reshape(*lead, rows, -1)
