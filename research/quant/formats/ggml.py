"""ggml's blocks of 32 weights in 4, 5 and 8 bits, as GGUF files hold them.

A block is 32 weights along the columns of a ggml matrix `[O, I]`: `scale *
(code - zero)`, or `scale * code + offset`. In memory the rows `O` come last
and a block's codes before them.

The logical weight is `[I, O]` (axis -2 of the leaf: a linear layer), or its
transpose `[O, I]` (axis -1: an embedding `[V, D]`); products with the latter
swap letters instead of moving numbers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.interop import gguf_types, unread
from research.quant.format import Format, Parts, Plain
from research.quant.qtensor import QTensor
from research.typing import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGML(Format):
  """One of ggml's types with blocks of 32.

  Parts: codes uint8 `[..., X, 16, O]`, low nibbles the block's first 16 codes,
  high nibbles the others, or int8 `[..., X, 32, O]` for 8 bits; scale float16
  `[..., X, O]`; some have offset, the same; 5 bits have high, uint8
  `[..., X, 4, O]`, bit `j` the fifth bit of code `j`.

  Attributes:
    kind: ggml's name of the type.
  """

  block: int = 32
  kind: str = "Q4_0"

  @property
  def name(self) -> str:
    return self.kind

  @property
  def type(self) -> gguf_types.Type:
    """Returns what GGUF says of the type."""
    return gguf_types.TYPES[self.kind]

  @property
  def traced(self) -> bool:
    return False

  def layout(self) -> dict[str, str]:
    layout = {"codes": "x.o", "scale": "xo"}
    if self.type.offset:
      layout |= {"offset": "xo"}
    return layout | ({"high": "x.o"} if self.type.high else {})

  def encode(
    self,
    w: Float[Array, "I O"] | np.ndarray,
    importance: Float[Array, " I"] | None = None,
  ) -> dict[str, Any]:
    """Returns the parts as the C reference encodes them; in NumPy."""
    del importance
    rows = np.asarray(w, np.float32).T
    raw = gguf_types.encode(self.kind, rows).reshape(rows.shape[0], -1)
    return self.split(raw)

  def split(self, raw: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the parts of blocks, uint8 `[O, bytes of a row]`."""
    found = gguf_types.split(self.type, raw)
    return {
      name: np.moveaxis(getattr(found, name), 0, -1) for name in self.layout()
    }

  def join(self, parts: Parts) -> np.ndarray:
    """Returns the blocks of one matrix, uint8 `[O, bytes of a row]`."""
    rows = {k: np.moveaxis(np.asarray(x), -1, 0) for k, x in parts.items()}
    return gguf_types.join(
      self.type,
      gguf_types.Parts(
        rows["codes"], rows.get("high"), rows["scale"], rows.get("offset")
      ),
    )

  def plain(self, parts: Parts) -> Plain:
    codes = parts["codes"]
    if self.type.bits < 8:
      codes = jnp.concatenate([codes & 15, codes >> 4], axis=-2)
    if self.type.high:
      shifts = jnp.arange(8, dtype=jnp.uint8)[:, None]
      bits = (parts["high"][..., None, :] >> shifts) & 1
      codes = codes | bits.reshape(codes.shape) << 4
    *lead, x, size, outputs = codes.shape
    return Plain(
      codes=codes.reshape(*lead, x * size, outputs),
      scale=parts["scale"],
      group=size,
      offset=parts.get("offset"),
      zero=float(self.type.zero),
      bits=self.type.bits,
    )


def packs(kind: str, shape: Sequence[int]) -> bool:
  """Whether a tensor of ggml type `kind` can be kept as a `QTensor`."""
  return len(shape) == 2 and gguf_types.TYPES[kind].bits is not None


def from_ggml(kind: str, matrices: Sequence[np.ndarray], axis: int) -> QTensor:
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
) -> QTensor:
  """Returns matrices as `from_ggml` does, of `unread.Unread` arrays.

  A part of one reads the rows and, in them, the blocks that it needs.

  Args:
    kind: ggml's name of the type, one that `packs`.
    matrices: each returns, of some of its rows, some of the blocks, uint8
      `[rows, bytes]`.
    shape: of each matrix, `[rows, blocks of a row]`.
    axis: as for `from_ggml`.
  """
  format = GGML(kind=kind)
  rows, columns = shape
  empty = format.split(np.zeros((1, format.type.nbytes), np.uint8))

  def leaf(name: str) -> unread.Unread:
    found = empty[name]

    def filler(matrix) -> unread.Fill:
      def fill(index, out):
        x, *inner, chosen = index
        part = format.split(matrix(chosen, x))[name]
        out[...] = part[:, *inner]

      return fill

    return unread.stacked(
      [filler(matrix) for matrix in matrices],
      (len(matrices),),
      (columns, *found.shape[1:-1], rows),
      found.dtype,
    )

  return QTensor(
    {name: leaf(name) for name in format.layout()},
    format=format,
    inputs=columns * format.block,
    outputs=rows,
    axis=axis,
  )


def to_ggml(w: QTensor) -> np.ndarray:
  """Returns the blocks as ggml stores them, uint8 `[..., rows, bytes]`.

  Args:
    w: in one of ggml's formats; byte for byte what it was made from.
  """
  count = int(np.prod(w.lead, dtype=np.int64))
  flat = {
    name: np.asarray(x).reshape(count, *x.shape[len(w.lead) :])
    for name, x in w.parts.items()
  }
  raw = [
    w.format.join({name: x[i] for name, x in flat.items()})
    for i in range(count)
  ]
  return np.stack(raw).reshape(*w.lead, w.outputs, -1)
