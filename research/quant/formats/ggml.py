"""ggml's Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, and a table of all ggml types.

A block is 32 weights along a row of a ggml matrix `[O, I]`: `scale *
(code - zero)`, or `scale * code + offset`. In memory the outputs `O` are the
last axis, after a block's codes.

The logical weight is `[I, O]` (axis -2 of the leaf: a linear layer), or its
transpose `[O, I]` (axis -1: an embedding `[V, D]`), for which products swap
einsum letters instead of transposing.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from research.io import unread
from research.quant.format import NormalForm, Parts
from research.quant.formats import ggml_fp4, iq4, kquants, ternary
from research.quant.ggml_format import Field, Ggml, merge_blocks, to_float16
from research.quant.numerics import ggml_bits as bits
from research.quant.numerics import scale_search
from research.quant.qtensor import QTensor
from research.ranges import OneOf

F = np.float32
KINDS = {
  "Q4_0": (4, 8, False),
  "Q4_1": (4, 0, True),
  "Q5_0": (5, 16, False),
  "Q5_1": (5, 0, True),
  "Q8_0": (8, 0, False),
}
"""Type name -> (bits of a code, zero, whether a block has an offset)."""

_OFFSET = Field("offset", "<f2")
_HIGH = Field("high", "u1", 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGML(Ggml):
  """One of ggml's types with blocks of 32.

  Parts: codes uint8 `[..., X, 16, O]`, low nibbles the block's first 16 codes,
  high nibbles the others, or int8 `[..., X, 32, O]` for 8 bits; scale float16
  `[..., X, O]`; for some types offset, like scale; for 5 bits high, uint8
  `[..., X, 4, O]`, bit `j` the fifth bit of code `j`.
  """

  block: int = 32
  kind: OneOf(*KINDS) = "Q4_0"

  @property
  def fields(self) -> tuple[Field, ...]:
    width, _, offset = KINDS[self.kind]
    return (
      Field("scale", "<f2"),
      *([_OFFSET] if offset else []),
      *([_HIGH] if width == 5 else []),
      Field("codes", "i1", 32) if width == 8 else Field("codes", "u1", 16),
    )

  def normal_form(self, parts: Parts) -> NormalForm:
    width, zero, _ = KINDS[self.kind]
    codes = parts["codes"]
    if width < 8:
      codes = bits.unfold(codes, 4, 16)
    if width == 5:
      codes = codes | bits.unfold(parts["high"], 1, 1) << 4
    return NormalForm(
      codes=merge_blocks(codes),
      scale=parts["scale"],
      group=32,
      offset=parts.get("offset"),
      zero=float(zero),
      bits=width,
    )

  def blocks(self, x, weight, mean):
    width, zero, offset = KINDS[self.kind]
    if width == 8:
      return self._encode_q8(x)
    top, low = 2**width - 1, None
    if weight is not None:
      errors = weight * np.sqrt(mean + x * x)
      if offset:
        scale, drop, codes = scale_search.affine(
          x, errors, top, (-0.9, 0.05, 36)
        )
        low = -drop
      else:
        scale, codes = scale_search.symmetric(x, zero, errors)
    elif offset:
      low, high = x.min(-2), x.max(-2)
      scale = (high - low) / F(top)
      codes = (x - low[:, None]) * _inverse(scale)[:, None] + F(0.5)
    else:
      scale = scale_search.extreme(x) / F(-zero)
      codes = x * _inverse(scale)[:, None] + F(zero + 0.5)
    codes = np.minimum(np.trunc(codes), F(top)).astype(np.uint8)
    parts = {"scale": to_float16(scale)[0]} | self.pack_codes(codes)
    return parts | ({"offset": to_float16(low)[0]} if offset else {})

  def pack_codes(self, codes):
    width, _, _ = KINDS[self.kind]
    if width == 8:
      return {"codes": codes}
    parts = {"codes": bits.fold(codes & 15, 4, 16)}
    return parts | ({"high": bits.fold(codes >> 4, 1, 1)} if width == 5 else {})

  def _encode_q8(self, x: np.ndarray) -> dict[str, np.ndarray]:
    scale = np.abs(x).max(-2) / F(127)
    codes = x * _inverse(scale)[:, None]
    # Ties round away from zero, without rounding twice.
    whole = np.trunc(codes)
    codes = whole + np.trunc(F(2) * (codes - whole))
    return {"scale": to_float16(scale)[0], "codes": codes.astype(np.int8)}


def _inverse(scale: np.ndarray) -> np.ndarray:
  return np.where(scale == 0, F(0), F(1) / np.where(scale == 0, F(1), scale))


TYPES: dict[str, Ggml] = {
  format.kind: format
  for format in (
    *(GGML(kind=kind) for kind in KINDS),
    *(kquants.Q2K(), kquants.Q3K(), kquants.Q4K(), kquants.Q5K()),
    *(kquants.Q6K(), kquants.Q8K(), iq4.IQ4NL(), iq4.IQ4XS()),
    *(ternary.TQ1(), ternary.TQ2()),
    *(ggml_fp4.GgmlMXFP4(), ggml_fp4.GgmlNVFP4()),
  )
}
"""ggml's name of a type -> format."""


def packs(kind: str, shape: Sequence[int]) -> bool:
  """Whether a tensor of ggml type `kind` can be stored as a `QTensor`."""
  return len(shape) == 2 and kind in TYPES


def is_stored(w: Any, axis: int) -> bool:
  """Whether a weight is in a ggml format along `axis`.

  Without a permutation of rows and without outliers."""
  return (
    isinstance(w, QTensor)
    and isinstance(w.format, Ggml)
    and w.axis == axis
    and w.order is None
    and w.outliers is None
  )


def from_ggml(kind: str, matrices: Sequence[np.ndarray], axis: int) -> QTensor:
  """Returns matrices of one type, stacked along a leading axis `[n, ...]`.

  Args:
    kind: ggml's name of the type, see `packs`.
    matrices: raw blocks of each, uint8 `[rows, bytes of a row]`.
    axis: -2 if ggml's rows are the logical columns (`[in, out]` from
      `[out, in]`), -1 if they are the logical rows (an embedding).
  """
  size = TYPES[kind].nbytes

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
  lead: tuple[int, ...] | None = None,
) -> QTensor:
  """Returns matrices like `from_ggml`, as `unread.LazyArray`s.

  Reading a slice reads only the rows and blocks that it needs.

  Args:
    matrices: (rows, blocks) -> raw blocks of a matrix, uint8 `[rows, bytes]`.
    shape: shape of each matrix, `[rows, blocks of a row]`.
    lead: sizes of the leading axes over matrices; one axis by default.
  """
  format = TYPES[kind]
  rows, columns = shape
  empty = format.split(np.zeros((1, format.nbytes), np.uint8))

  def leaf(name: str) -> unread.LazyArray:
    found = empty[name]

    def filler(matrix) -> unread.Fill:
      def read(index):
        x, *inner, chosen = index
        return format.split(matrix(chosen, x))[name][:, *inner]

      return unread.in_pieces(
        read, axis=found.ndim - 1, nbytes=columns * format.nbytes
      )

    return unread.stacked(
      [filler(matrix) for matrix in matrices],
      (len(matrices),) if lead is None else lead,
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
  """Returns raw blocks as ggml stores them, uint8 `[..., rows, bytes]`.

  Inverts `from_ggml` byte for byte.

  Args:
    w: a packed matrix in one of ggml's formats.
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
