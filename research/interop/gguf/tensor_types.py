"""GGUF's types: how many bytes they take, and arrays to and from them.

Block types are decoded and encoded by `research.quant.formats.ggml`, bit for
bit as by ggml's own code. A type that is known only by its size can be carried,
not decoded.

Constants are written out, since the package `gguf` (0.19) would bring requests
and its four for them, and gives Q8_1 40 bytes where ggml has 36; all others are
alike (`test_gguf_constants.py`).
"""

import dataclasses

import ml_dtypes
import numpy as np

from research.quant.formats import ggml
from research.typing import UserError


@dataclasses.dataclass(frozen=True)
class Type:
  """One ggml type.

  Attributes:
    name, id: ggml's.
    block: weights a block.
    nbytes: bytes a block.
  """

  name: str
  id: int
  block: int
  nbytes: int


_ALL = (
  Type("F32", 0, 1, 4),
  Type("F16", 1, 1, 2),
  Type("Q4_0", 2, 32, 18),
  Type("Q4_1", 3, 32, 20),
  Type("Q5_0", 6, 32, 22),
  Type("Q5_1", 7, 32, 24),
  Type("Q8_0", 8, 32, 34),
  Type("Q8_1", 9, 32, 36),
  Type("Q2_K", 10, 256, 84),
  Type("Q3_K", 11, 256, 110),
  Type("Q4_K", 12, 256, 144),
  Type("Q5_K", 13, 256, 176),
  Type("Q6_K", 14, 256, 210),
  Type("Q8_K", 15, 256, 292),
  Type("IQ2_XXS", 16, 256, 66),
  Type("IQ2_XS", 17, 256, 74),
  Type("IQ3_XXS", 18, 256, 98),
  Type("IQ1_S", 19, 256, 50),
  Type("IQ4_NL", 20, 32, 18),
  Type("IQ3_S", 21, 256, 110),
  Type("IQ2_S", 22, 256, 82),
  Type("IQ4_XS", 23, 256, 136),
  Type("I8", 24, 1, 1),
  Type("I16", 25, 1, 2),
  Type("I32", 26, 1, 4),
  Type("I64", 27, 1, 8),
  Type("F64", 28, 1, 8),
  Type("IQ1_M", 29, 256, 56),
  Type("BF16", 30, 1, 2),
  Type("TQ1_0", 34, 256, 54),
  Type("TQ2_0", 35, 256, 66),
  Type("MXFP4", 39, 32, 17),
  Type("NVFP4", 40, 64, 36),
)
TYPES = {t.name: t for t in _ALL}
BY_ID = {t.id: t for t in _ALL}
_PLAIN = {
  "F32": np.dtype("<f4"),
  "F16": np.dtype("<f2"),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
SUPPORTED = (*_PLAIN, *ggml.TYPES)


def require(kind: str, what: str) -> Type:
  """Returns the supported type called `kind`.

  Raises:
    UserError: it is another.
  """
  if kind not in SUPPORTED:
    raise UserError(
      f"{what} has type {kind}; supported: {', '.join(SUPPORTED)}"
    )
  return TYPES[kind]


def decode(kind: str, raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Returns the float32 array that bytes of type `kind` stand for.

  Args:
    raw: uint8, one dimension.
    shape: of the array; the last axis is a whole number of blocks.

  Raises:
    UserError: the type is not supported.
  """
  known = require(kind, "an array")
  if kind in _PLAIN:
    return raw.view(_PLAIN[kind]).astype(np.float32).reshape(shape)
  format = ggml.TYPES[kind]
  parts = format.split(raw.reshape(-1, shape[-1] // known.block * known.nbytes))
  return format.values(parts).T.reshape(shape)


def _bfloat16(x: np.ndarray) -> np.ndarray:
  """Returns bits of `x` rounded to nearest even, NaNs quieted."""
  bits = x.view(np.uint32)
  nan = (bits & 0x7FFFFFFF) > 0x7F800000
  rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
  quiet = (bits >> 16) | 64
  return np.where(nan, quiet, rounded).astype("<u2")


def encode(
  kind: str, x: np.ndarray, importance: np.ndarray | None = None
) -> np.ndarray:
  """Returns `x` in blocks of type `kind`, uint8 of one dimension.

  Args:
    kind: a supported type's name.
    x: float32, finite; the last axis is a whole number of blocks.
    importance: of each column, for types that search; or None.

  Raises:
    UserError: the type is not supported, the last axis does not divide, or a
      block type is asked to hold an infinity or NaN.
  """
  known = require(kind, "the encoding asked for")
  x = np.ascontiguousarray(x, dtype=np.float32)
  if kind == "BF16":
    return _bfloat16(x.reshape(-1)).view(np.uint8)
  if kind in _PLAIN:
    return x.reshape(-1).astype(_PLAIN[kind]).view(np.uint8)
  if not x.ndim or x.shape[-1] % known.block:
    raise UserError(
      f"{kind} needs rows of a multiple of {known.block} weights; "
      f"found shape {x.shape}"
    )
  format = ggml.TYPES[kind]
  rows = x.reshape(-1, x.shape[-1])
  return format.join(format.encode(rows.T, importance)).reshape(-1)
