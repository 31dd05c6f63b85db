"""Packed weights in planes: the layout that TPU and GPU kernels decode.

A TPU vector register holds 8 rows (sublanes) of 128 columns (lanes) in 32 bits,
or 16 rows in bfloat16, where a 32-bit word holds rows 2s and 2s + 1. So a 4-bit
matrix is divided into blocks of 128 rows, and a block into four planes of 32:
word s of a block holds rows 2s (low half) and 2s + 1 (high half) of every
plane, plane j in bits 4j of each half. One shift and two bit operations then
decode a plane to bfloat16, with rows in order: no data moves between lanes or
sublanes. 8-bit codes are stored as they are.

As in `panels`, with the same arguments to `pack`,

  weight[i, o] = scale[i // group, o] * code[i, o] + offset[i // group, o]
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from kernels_pallas.quantized_matmul.cpu.panels import AFFINE, check_range

LANES = 128
"""Outputs are padded to whole registers, as a TPU pads its memory anyway."""

BLOCK = 128
"""Inputs per block: four planes of 32."""

PLANES = 4
PLANE = BLOCK // PLANES
WORDS = BLOCK // 8
"""Words per block of 4-bit codes."""

LEAST = 16
"""Smallest group: the rows of a bfloat16 register."""

_SCALES = ("float32", "float16", "bfloat16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Planar:
  """A matrix `[I, O]`, with any leading axes; see `pack`.

  Axes -2 of all arrays follow the inputs, axes -1 the outputs: slicing them
  alike slices the matrix, outputs at multiples of 128, inputs at multiples of
  128 and of the group.

  Attributes:
    codes: uint32 `[..., I' / 8, O']` (4 bits) or int8 `[..., I', O']`; 8 bits
      `in_words` are uint32 `[..., I' / 4, O']`. `I'` and `O'` are zero-padded
      to whole blocks, groups and lanes.
    scale: `[..., I' / group, O']`.
    offset: the same shape, or None.
    inputs, outputs: `I`, `O`.
    bits: per code, 4 or 8.
    group: inputs that share a scale; `I'` if all do.
    codebook: values of 4-bit codes, else empty.
  """

  codes: Any
  scale: Any
  offset: Any
  inputs: int = dataclasses.field(metadata=dict(static=True))
  outputs: int = dataclasses.field(metadata=dict(static=True))
  bits: int = dataclasses.field(metadata=dict(static=True))
  group: int = dataclasses.field(metadata=dict(static=True))
  codebook: tuple[float, ...] = dataclasses.field(
    default=(), metadata=dict(static=True)
  )

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.codes.shape[:-2], self.inputs, self.outputs)

  @property
  def padded(self) -> tuple[int, int]:
    """Returns inputs and outputs with their padding."""
    rows = 32 // self.bits if self.words else 1
    return self.codes.shape[-2] * rows, self.codes.shape[-1]

  @property
  def words(self) -> bool:
    """Returns whether codes are packed in words: all of 4 bits, some of 8."""
    return self.codes.dtype == jnp.uint32


def pack(
  codes: Num[Array, "... I O"] | np.ndarray,
  scale: Float[Array, "... X O"] | np.ndarray,
  offset: Float[Array, "... X O"] | np.ndarray | None = None,
  *,
  group: int | None = None,
  codebook: Sequence[float] = AFFINE,
) -> Planar:
  """Returns the packed matrix; `unpack` inverts it exactly.

  Args:
    codes: uint8 below 16 (4 bits) or int8 (8 bits).
    scale: of groups of inputs, in float32, bfloat16 or float16 (which TPUs do
    not
      read: it is converted in every call).
    offset: added to a group's weights.
    group: inputs per scale: 16, 32, 64, a multiple of 128, or at least I; by
      default `I / X`. The last group may be shorter.
    codebook: 16 values of the 4-bit codes.

  Raises:
    ValueError: types or shapes do not match.
  """
  bits = {"uint8": 4, "int8": 8}.get(str(codes.dtype))
  if bits is None or codes.ndim < 2 or 0 in codes.shape:
    raise ValueError(
      f"codes: found {codes.dtype} {codes.shape}, expected uint8 (4 bits) or "
      "int8 (8 bits), [..., inputs, outputs]"
    )
  if bits == 4:
    check_range(codes)
  if bits == 4 and (len(codebook) != 16 or not np.isfinite(codebook).all()):
    raise ValueError(f"codebook: found {codebook}, expected 16 finite numbers")
  inputs, outputs = codes.shape[-2:]
  group = _check_scales(codes, scale, offset, group)
  rows = _up(inputs, max(BLOCK, group))
  raw = _padded(jnp.asarray(codes), rows)

  def part(x):
    return None if x is None else _padded(jnp.asarray(x), rows // group)

  return Planar(
    codes=_words(raw) if bits == 4 else raw,
    scale=part(scale),
    offset=part(offset),
    inputs=inputs,
    outputs=outputs,
    bits=bits,
    group=group,
    codebook=tuple(map(float, codebook)) if bits == 4 else (),
  )


def _check_scales(codes, scale, offset, group) -> int:
  """Returns the number of inputs per scale, with padding."""
  *lead, inputs, outputs = codes.shape
  if group is None:
    if scale.ndim < 2 or scale.shape[-2] < 1 or inputs % scale.shape[-2]:
      raise ValueError(
        f"scale: found {scale.shape}, expected a divisor of {inputs} inputs on "
        "axis -2; or give group"
      )
    group = inputs // scale.shape[-2]
  whole = _up(inputs, BLOCK) if group >= inputs else group
  if whole < LEAST or (whole % BLOCK and BLOCK % whole):
    raise ValueError(
      f"group: found {group}, expected 16, 32, 64, a multiple of {BLOCK}, or "
      f"all {inputs} inputs"
    )
  want = (*lead, -(-inputs // group), outputs)
  for name, part in (("scale", scale), ("offset", offset)):
    fits = part is None or (part.shape, str(part.dtype) in _SCALES) == (
      want,
      True,
    )
    if not fits:
      raise ValueError(
        f"{name}: found {part.dtype} {part.shape}, expected {want} in one of "
        f"{', '.join(_SCALES)}"
      )
  return whole


def _up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def _padded(x: Array, rows: int) -> Array:
  """Zero-pads to `[..., rows, O']`."""
  *lead, found, outputs = x.shape
  pad = ((0, 0),) * len(lead)
  return jnp.pad(x, (*pad, (0, rows - found), (0, -outputs % LANES)))


def in_words(w: Planar) -> Planar:
  """Packs 8-bit codes into words like 4-bit ones, as GPUs decode them.

  A word holds two adjacent inputs of two planes of 32, each as 128 + code; a
  block is then 64 inputs. 4-bit codes are already in words.
  """
  if w.words:
    return w
  codes = jax.lax.bitcast_convert_type(w.codes, jnp.uint8) ^ jnp.uint8(128)
  return dataclasses.replace(w, codes=_words(codes, 8))


def _shifts(bits: int) -> Array:
  """Returns the shifts of plane j and half h in a word, `[J, 1, 2, 1]`."""
  planes = bits * jnp.arange(16 // bits, dtype=jnp.uint32)
  halves = 16 * jnp.arange(2, dtype=jnp.uint32)
  return planes[:, None, None, None] + halves[:, None]


def _words(codes: Array, bits: int = 4) -> Array:
  """Packs codes `[..., I', O']` into words `[..., I' / J / 2, O']`."""
  *lead, rows, lanes = codes.shape
  apart = codes.reshape(*lead, -1, 16 // bits, WORDS, 2, lanes)
  words = (apart.astype(jnp.uint32) << _shifts(bits)).sum(
    (-4, -2), dtype=jnp.uint32
  )
  return words.reshape(*lead, rows * bits // 32, lanes)


def _codes(w: Planar) -> Array:
  """Returns codes `[..., I', O']`."""
  if not w.words:
    return w.codes
  *lead, rows, lanes = w.codes.shape
  words = w.codes.reshape(*lead, rows // WORDS, 1, WORDS, 1, lanes)
  codes = (words >> _shifts(w.bits)) & jnp.uint32(2**w.bits - 1)
  codes = codes.reshape(*lead, w.padded[0], lanes).astype(jnp.uint8)
  if w.bits == 4:
    return codes
  return jax.lax.bitcast_convert_type(codes ^ jnp.uint8(128), jnp.int8)


def unpack(
  w: Planar,
) -> tuple[
  Num[Array, "... I O"],
  Float[Array, "... X O"],
  Float[Array, "... X O"] | None,
]:
  """Returns `(codes, scale, offset)` as given to `pack`."""
  groups = -(-w.inputs // w.group)

  def part(x):
    return None if x is None else x[..., :groups, : w.outputs]

  codes = _codes(w)[..., : w.inputs, : w.outputs]
  return codes, part(w.scale), part(w.offset)


def dense(w: Planar, dtype: Any = jnp.float32) -> Float[Array, "... I O"]:
  """Returns the dequantized matrix, computed in at least float32."""
  wide = jnp.promote_types(dtype, jnp.float32)
  codes, scale, offset = unpack(w)
  if w.bits == 4:
    matrix = jnp.asarray(w.codebook, wide)[codes.astype(jnp.int32)]
  else:
    matrix = codes.astype(wide)

  def repeated(part):
    whole = jnp.repeat(part.astype(wide), w.group, axis=-2)
    return whole[..., : w.inputs, :]

  matrix = matrix * repeated(scale)
  if offset is not None:
    matrix = matrix + repeated(offset)
  return matrix.astype(dtype)
