"""ggml's MXFP4 and NVFP4: E2M1 codes with an 8-bit scale per group.

ggml halves the scales and doubles the codebook's values, which are then
integers. ggml's NVFP4 has no per-tensor scale.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from research.quant.format import NormalForm, Parts
from research.quant.ggml_format import (
  Field,
  Ggml,
  merge_blocks,
  merge_groups,
  split_groups,
)
from research.quant.numerics import ggml_bits as bits

F = np.float32
CODEBOOK = (
  *(0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0),
  *(0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0),
)
_MIDDLES = np.array([0.5, 1.5, 2.5, 3.5, 5, 7, 10], F)


def _exponents() -> np.ndarray:
  """Returns half the value of each E8M0 byte; ggml has no NaN there."""
  byte = np.arange(256, dtype=np.uint32)
  small = np.uint32(0x200000) << np.minimum(byte, 1)
  return np.where(byte < 2, small, (byte - 1) << 23).astype(np.uint32).view(F)


def _unsigned() -> np.ndarray:
  """Returns half the value of each E4M3 byte, ignoring the sign."""
  byte = np.arange(256)
  exponent, mantissa = (byte >> 3) & 15, byte & 7
  normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
  value = np.where(exponent == 0, mantissa * 2.0**-9, normal) / 2
  return np.where(byte == 0x7F, 0, value).astype(F)


_EXPONENTS, _UNSIGNED = _exponents(), _unsigned()


def _look_up(table: np.ndarray, at: Any) -> Any:
  if isinstance(at, np.ndarray):
    return table[at]
  return jnp.take(jnp.asarray(table), at.astype(jnp.int32))


def _codes(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """Returns the nearest codes of groups; ties go to the smaller magnitude."""
  scale = scale[..., None, :]
  size = np.abs(x)
  codes = np.zeros(x.shape, np.uint8)
  for middle in _MIDDLES:
    codes += size > middle * scale
  codes[np.broadcast_to(scale == 0, codes.shape)] = 0
  return codes | ((x < 0) & (codes > 0)).astype(np.uint8) << 3


def _to_unsigned(x: np.ndarray) -> np.ndarray:
  """Returns the E4M3 bytes of nonnegative numbers, ties rounded up.

  As in the C reference, all numbers from 256 on become 448, the largest.
  """
  word = np.minimum(x, F(448)).view(np.uint32).astype(np.int64)
  # Adding half an ulp carries into the exponent if necessary.
  normal = ((word + (1 << 19)) >> 20) - (120 << 3)
  small = np.minimum((x * F(512) + F(0.5)).astype(np.int64), 7)
  normal = np.where(normal < 15 << 3, normal, 0x7E)
  return np.where(x < F(2**-6), small, normal).astype(np.uint8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgmlMXFP4(Ggml):
  """MXFP4: 32 weights share a power of two, 4.25 bits per weight."""

  kind: ClassVar[str] = "MXFP4"
  fields: ClassVar[tuple[Field, ...]] = (
    Field("scale", "u1"),
    Field("codes", "u1", 16),
  )
  block: int = 32

  def normal_form(self, parts: Parts) -> NormalForm:
    return NormalForm(
      codes=merge_blocks(bits.unfold(parts["codes"], 4, 16)),
      scale=_look_up(_EXPONENTS, parts["scale"]),
      group=32,
      codebook=CODEBOOK,
    )

  def blocks(self, x, weight, mean):
    most = np.abs(x).max(-2)
    power = np.floor(np.log2(np.where(most > 0, most, F(1)))) + F(125)
    scale = np.where(most > 0, np.maximum(power, F(0)), F(0)).astype(np.uint8)
    return {"scale": scale} | self.pack_codes(_codes(x, _EXPONENTS[scale]))

  def pack_codes(self, codes):
    return {"codes": bits.fold(codes, 4, 16)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgmlNVFP4(Ggml):
  """NVFP4: 16 weights share an unsigned E4M3 scale, 4.5 bits per weight."""

  kind: ClassVar[str] = "NVFP4"
  fields: ClassVar[tuple[Field, ...]] = (
    Field("scale", "u1", 4),
    Field("codes", "u1", 32),
  )
  block: int = 64

  def normal_form(self, parts: Parts) -> NormalForm:
    return NormalForm(
      codes=merge_blocks(bits.unfold(parts["codes"], 4, 8)),
      scale=merge_blocks(_look_up(_UNSIGNED, parts["scale"])),
      group=16,
      codebook=CODEBOOK,
    )

  def blocks(self, x, weight, mean):
    xs = split_groups(x, 16)
    scale = _to_unsigned(np.abs(xs).max(-2) / F(6))
    codes = merge_groups(_codes(xs, _UNSIGNED[scale]))
    return {"scale": scale} | self.pack_codes(codes)

  def pack_codes(self, codes):
    return {"codes": bits.fold(codes, 4, 8)}
