"""GGUF's block types: 32 weights of a row with a scale and maybe an offset.

Layouts are ggml's (`ggml-common.h`); decoding is bitwise that of the `gguf`
package, encoding byte for byte that of the C reference. A type that is known
only by its size can be carried, not decoded.
"""

import dataclasses

import ml_dtypes
import numpy as np

from research.typing import UserError


@dataclasses.dataclass(frozen=True)
class Type:
  """One ggml type.

  Attributes:
    name, id: ggml's.
    block: weights a block.
    nbytes: bytes a block.
    bits: of a code in types that `split` understands, else None.
    zero: what is subtracted from each code.
    offset: whether a block has an offset besides its scale.
  """

  name: str
  id: int
  block: int
  nbytes: int
  bits: int | None = None
  zero: int = 0
  offset: bool = False

  @property
  def high(self) -> bool:
    """Whether each code's fifth bit lies in four bytes of its own."""
    return self.bits == 5


_ALL = (
  Type("F32", 0, 1, 4),
  Type("F16", 1, 1, 2),
  Type("Q4_0", 2, 32, 18, bits=4, zero=8),
  Type("Q4_1", 3, 32, 20, bits=4, offset=True),
  Type("Q5_0", 6, 32, 22, bits=5, zero=16),
  Type("Q5_1", 7, 32, 24, bits=5, offset=True),
  Type("Q8_0", 8, 32, 34, bits=8),
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
SUPPORTED = tuple(_PLAIN) + tuple(t.name for t in _ALL if t.bits)


def require(kind: str, what: str) -> Type:
  """Returns the supported type called `kind`.

  Args:
    kind: ggml's name.
    what: what has it, for the message.

  Raises:
    UserError: it is another.
  """
  if kind not in SUPPORTED:
    raise UserError(
      f"{what} has type {kind}; supported: {', '.join(SUPPORTED)}"
    )
  return TYPES[kind]


@dataclasses.dataclass(frozen=True)
class Parts:
  """Blocks of one type, taken apart; leading axes are `[rows, X]`.

  Attributes:
    codes: uint8 `[..., 16]`, low nibbles the first 16 codes and high nibbles
      the others; or int8 `[..., 32]` for 8 bits.
    high: uint8 `[..., 4]`, bit `j` (little endian) the fifth bit of code `j`,
      or None.
    scale: float16 `[...]`.
    offset: float16 `[...]` or None.
  """

  codes: np.ndarray
  high: np.ndarray | None
  scale: np.ndarray
  offset: np.ndarray | None


def split(kind: Type, raw: np.ndarray) -> Parts:
  """Returns the parts of blocks `raw`, uint8 `[rows, X * nbytes]`."""
  blocks = raw.reshape(raw.shape[0], -1, kind.nbytes)
  head = 4 if kind.offset else 2
  halves = np.ascontiguousarray(blocks[..., :head]).view("<f2")
  high = None
  if kind.high:
    high = blocks[..., head : head + 4]
    head += 4
  codes = blocks[..., head:]
  return Parts(
    codes=codes.view(np.int8) if kind.bits == 8 else codes,
    high=high,
    scale=halves[..., 0],
    offset=halves[..., 1] if kind.offset else None,
  )


def join(kind: Type, parts: Parts) -> np.ndarray:
  """Returns blocks, uint8 `[rows, X * nbytes]`; inverts `split`."""
  halves = (
    [parts.scale] if parts.offset is None else [parts.scale, parts.offset]
  )
  pieces = [np.stack(halves, axis=-1).astype("<f2", copy=False).view(np.uint8)]
  if parts.high is not None:
    pieces.append(parts.high)
  pieces.append(parts.codes.view(np.uint8))
  blocks = np.concatenate(pieces, axis=-1)
  if blocks.shape[-1] != kind.nbytes:
    raise ValueError(f"{kind.name}: {blocks.shape[-1]} bytes a block")
  return blocks.reshape(blocks.shape[0], -1)


def _integers(kind: Type, parts: Parts) -> np.ndarray:
  """Returns the codes less their zero, float32 `[rows, X, 32]`."""
  if kind.bits == 8:
    return parts.codes.astype(np.float32)
  codes = np.concatenate([parts.codes & 15, parts.codes >> 4], axis=-1)
  if parts.high is not None:
    codes |= np.unpackbits(parts.high, axis=-1, bitorder="little") << 4
  return codes.astype(np.float32) - np.float32(kind.zero)


def decode(kind: str, raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Returns the float32 array that bytes of type `kind` stand for.

  Args:
    kind: a supported type's name.
    raw: uint8, one dimension.
    shape: of the array; the last axis is a whole number of blocks.

  Raises:
    UserError: the type is not supported.
  """
  known = require(kind, "an array")
  if kind in _PLAIN:
    return raw.view(_PLAIN[kind]).astype(np.float32).reshape(shape)
  parts = split(known, raw.reshape(-1, known.nbytes))
  values = _integers(known, parts)
  values *= parts.scale.astype(np.float32)[..., None]
  if parts.offset is not None:
    values += parts.offset.astype(np.float32)[..., None]
  return values.reshape(shape)


def _bfloat16(x: np.ndarray) -> np.ndarray:
  """Returns bits of `x` rounded to nearest even, NaNs quieted."""
  bits = x.view(np.uint32)
  nan = (bits & 0x7FFFFFFF) > 0x7F800000
  rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
  quiet = (bits >> 16) | 64
  return np.where(nan, quiet, rounded).astype("<u2")


def _inverse(scale: np.ndarray) -> np.ndarray:
  """Returns `1 / scale` in float32, 0 where `scale` is 0."""
  with np.errstate(divide="ignore"):
    return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _round_away(x: np.ndarray) -> np.ndarray:
  """Returns C's `roundf`: halves away from zero, without double rounding."""
  whole = np.trunc(x)
  return whole + np.trunc(2 * (x - whole))


def _encode_symmetric(kind: Type, x: np.ndarray):
  """Maps the value of largest magnitude, sign included, to code 0."""
  first = np.abs(x).argmax(-1)[..., None]
  extreme = np.take_along_axis(x, first, -1)
  scale = extreme / np.float32(-kind.zero)
  # The reference's product and sum are fused; float64 rounds alike.
  codes = x.astype(np.float64) * _inverse(scale).astype(np.float64)
  codes = np.trunc((codes + (kind.zero + 0.5)).astype(np.float32))
  return codes, scale, None


def _encode_affine(kind: Type, x: np.ndarray):
  """Maps the smallest value to code 0, the largest to the last code."""
  low, top = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
  scale = (top - low) / np.float32(2**kind.bits - 1)
  codes = np.trunc((x - low) * _inverse(scale) + np.float32(0.5))
  return codes, scale, low


def encode(kind: str, x: np.ndarray) -> np.ndarray:
  """Returns `x` in blocks of type `kind`, uint8 of one dimension.

  Args:
    kind: a supported type's name.
    x: float32, finite; the last axis is a whole number of blocks.

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
  if not np.isfinite(x).all():
    raise UserError(f"{kind} cannot hold weights that are not finite numbers")
  blocks = x.reshape(-1, 1, known.block)
  if known.bits == 8:
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    codes = _round_away(blocks * _inverse(scale)).astype(np.int8)
    return join(known, Parts(codes, None, scale[..., 0], None)).reshape(-1)
  f = _encode_affine if known.offset else _encode_symmetric
  codes, scale, low = f(known, blocks)
  codes = np.clip(codes, 0, 2**known.bits - 1).astype(np.uint8)
  high = None
  if known.high:
    high = np.packbits(codes >> 4, axis=-1, bitorder="little")
    codes &= 15
  parts = Parts(
    codes=codes[..., :16] | codes[..., 16:] << 4,
    high=high,
    scale=scale[..., 0].astype(np.float16),
    offset=None if low is None else low[..., 0].astype(np.float16),
  )
  return join(known, parts).reshape(-1)
