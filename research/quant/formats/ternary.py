"""ggml's ternary types TQ1_0 and TQ2_0: -1, 0 or 1 times a float16 scale.

Blocks have 256 weights. For models trained with ternary weights (BitNet b1.58,
Ma et al. 2024, arXiv:2402.17764): the encoder uses the largest magnitude as the
scale.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from research.quant.format import NormalForm, Parts
from research.quant.ggml_format import (
  Field,
  SuperBlock,
  merge_blocks,
  to_float16,
)
from research.quant.numerics import ggml_bits as bits

F = np.float32
BLOCK = 256


def _plain(codes: Any, scale: Any) -> NormalForm:
  codes = merge_blocks(codes)
  return NormalForm(
    codes, scale, group=BLOCK, zero=1.0, bits=2, code_range=(0, 2)
  )


def _rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns (codes 0 to 2, float16 scale); ties round away from zero."""
  most = np.abs(x).max(-2)
  inverse = np.where(most == 0, F(0), F(1) / np.where(most == 0, F(1), most))
  scaled = x * inverse[:, None]
  codes = (np.abs(scaled) >= F(0.5)) * np.sign(scaled) + F(1)
  return codes.astype(np.uint8), to_float16(most)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TQ2(SuperBlock):
  """TQ2_0: 2 bits per code, 2.0625 bits per weight."""

  kind: ClassVar[str] = "TQ2_0"
  fields: ClassVar[tuple[Field, ...]] = (
    Field("codes", "u1", 64),
    Field("scale", "<f2"),
  )

  def normal_form(self, parts: Parts) -> NormalForm:
    return _plain(bits.unfold(parts["codes"], 2, 32), parts["scale"])

  def blocks(self, x, weight, mean):
    codes, scale = _rounded(x)
    return {"scale": scale} | self.pack_codes(codes)

  def pack_codes(self, codes):
    return {"codes": bits.fold(codes, 2, 32)}


_RUNS = ((160, 32, 5), (80, 16, 5), (16, 4, 4))
"""(Codes, distance between the codes of a byte, codes per byte) of each run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TQ1(SuperBlock):
  """TQ1_0: five base-3 digits per byte, 1.6875 bits per weight."""

  kind: ClassVar[str] = "TQ1_0"
  fields: ClassVar[tuple[Field, ...]] = (
    Field("codes", "u1", 48),
    Field("last", "u1", 4),
    Field("scale", "<f2"),
  )

  def normal_form(self, parts: Parts) -> NormalForm:
    packed = parts["codes"]
    xp = np if isinstance(packed, np.ndarray) else jnp
    packed = xp.concatenate([packed, parts["last"]], axis=-2)
    out, at = [], 0
    for size, run, count in _RUNS:
      digits = packed[..., None, at : at + run, :]
      at += run
      powers = np.array([3**k for k in range(count)], np.uint8)
      # A byte is a fraction of 256; multiplying by 3^k exposes digit k.
      rest = digits * powers[:, None, None]
      codes = ((rest.astype(np.uint16) * np.uint16(3)) >> 8).astype(np.uint8)
      out.append(codes.reshape(*codes.shape[:-3], size, codes.shape[-1]))
    return _plain(xp.concatenate(out, axis=-2), parts["scale"])

  def blocks(self, x, weight, mean):
    codes, scale = _rounded(x)
    return {"scale": scale} | self.pack_codes(codes)

  def pack_codes(self, codes):
    xp = np if isinstance(codes, np.ndarray) else jnp
    out, at = [], 0
    for size, run, count in _RUNS:
      digits = codes[:, at : at + size].reshape(len(codes), count, run, -1)
      at += size
      powers = np.array([3 ** (4 - k) for k in range(count)], np.uint16)
      digits = digits.astype(np.uint16) * powers[:, None, None]
      value = digits.sum(1, dtype=np.uint16)
      # Round up, so that decoding, which truncates, finds the same digits.
      value = (value * np.uint16(256) + np.uint16(242)) // np.uint16(243)
      out.append(value.astype(np.uint8))
    return {"codes": xp.concatenate(out[:2], axis=1), "last": out[2]}
