"""ggml's IQ4_NL and IQ4_XS: 4-bit codes of a nonuniform codebook without zero.

IQ4_NL has a float16 scale per 32 weights; IQ4_XS a 6-bit scale per 32 and a
float16 scale per 256. The encoder tries scales that map the largest magnitude
near the codebook's end, and solves for the best scale with the resulting codes.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from research.quant.format import NormalForm, Parts
from research.quant.ggml_format import (
  Field,
  Ggml,
  SuperBlock,
  error_weights,
  merge_blocks,
  split_groups,
  to_float16,
)
from research.quant.numerics import ggml_bits as bits
from research.quant.numerics import scale_search

F = np.float32
CODEBOOK = (
  *(-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0),
  *(1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0),
)
TRIES = 7

_VALUES = np.array(CODEBOOK, F)
# Decision thresholds are multiples of 1/2, ties round up: the table has the
# nearest code of each interval [t / 2, (t + 1) / 2).
_HALVES = np.arange(2 * -127, 2 * 113 + 1) / 2
_MIDDLES = (_VALUES[1:] + _VALUES[:-1]) / 2
_NEAREST = np.searchsorted(_MIDDLES, _HALVES, side="right").astype(np.uint8)


def _nearest(x: np.ndarray) -> np.ndarray:
  at = np.floor(x * F(2))
  np.maximum(at, F(2 * -127), out=at)
  np.minimum(at, F(2 * 113), out=at)
  return _NEAREST[(at + F(2 * 127)).astype(np.intp)]


def _inverse(scale: np.ndarray) -> np.ndarray:
  return np.where(scale == 0, F(0), F(1) / np.where(scale == 0, F(1), scale))


def _search(x, weight, tries):
  """Returns (scale, codes of the first trial) of groups `[..., 32, O]`."""
  most = scale_search.extreme(x)
  empty = np.abs(most) < scale_search.EMPTY
  most = np.where(empty, F(1), most)

  def fitted(inverse):
    codes = _nearest(inverse[..., None, :] * x)
    q = _VALUES[codes]
    # In the reference's order, (w q) x, which rounds differently from (w x) q.
    wq = weight * q
    return codes, scale_search.total(wq * x), scale_search.total(wq * q)

  start = most / _VALUES[0]
  codes, xl, ll = fitted(F(1) / (-start if tries else start))
  scale = scale_search.ratio(xl, ll)
  best = scale * xl
  for step in range(-tries, tries + 1) if tries else ():
    _, xl, ll = fitted((F(step) + _VALUES[0]) / most)
    better = (ll > 0) & (xl * xl > best * ll)
    scale = np.where(better, scale_search.ratio(xl, ll), scale)
    best = np.where(better, scale * xl, best)
  codes[np.broadcast_to(empty[..., None, :], codes.shape)] = 0
  return np.where(empty, F(0), scale), codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class IQ4NL(Ggml):
  """IQ4_NL, 4.5 bits per weight.

  Attributes:
    tries: number of trials on either side, 0 for no search.
  """

  kind: ClassVar[str] = "IQ4_NL"
  fields: ClassVar[tuple[Field, ...]] = (
    Field("scale", "<f2"),
    Field("codes", "u1", 16),
  )
  block: int = 32
  tries: int = TRIES

  def normal_form(self, parts: Parts) -> NormalForm:
    return NormalForm(
      codes=merge_blocks(bits.unfold(parts["codes"], 4, 16)),
      scale=parts["scale"],
      group=32,
      codebook=CODEBOOK,
    )

  def blocks(self, x, weight, mean):
    w = x * x if weight is None else error_weights(x, weight, 32)[:, 0]
    scale, codes = _search(x, w, self.tries)
    if self.tries:
      codes = _nearest(_inverse(scale)[:, None] * x)
    return {"scale": to_float16(scale)[0]} | self.pack_codes(codes)

  def pack_codes(self, codes):
    return {"codes": bits.fold(codes, 4, 16)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class IQ4XS(SuperBlock):
  """IQ4_XS, 4.25 bits per weight."""

  kind: ClassVar[str] = "IQ4_XS"
  fields: ClassVar[tuple[Field, ...]] = (
    Field("scale", "<f2"),
    Field("high", "u1", 2),
    Field("low", "u1", 4),
    Field("codes", "u1", 128),
  )

  def normal_form(self, parts: Parts) -> NormalForm:
    scales = bits.unfold(parts["low"], 4, 1)
    scales = scales | bits.unfold(parts["high"], 2, 1) << 4
    scales = scales.astype(np.float32) - F(32)
    d = parts["scale"].astype(np.float32)[..., None, :]
    return NormalForm(
      codes=merge_blocks(bits.unfold(parts["codes"], 4, 16)),
      scale=merge_blocks(d * scales),
      group=32,
      codebook=CODEBOOK,
    )

  def blocks(self, x, weight, mean):
    xs = split_groups(x, 32)
    w = xs * xs if weight is None else error_weights(x, weight, 32)
    scale, _ = _search(xs, w, TRIES)
    d = -scale_search.extreme(scale) / F(32)
    steps = np.rint(_inverse(d)[:, None] * scale)
    steps = np.minimum(np.maximum(steps, F(-32)), F(31))
    inverse = _inverse(d[:, None] * steps)
    codes = _nearest(inverse[..., None, :] * xs)
    steps = (steps + F(32)).astype(np.uint8)
    scales = {
      "scale": to_float16(d)[0],
      "high": bits.fold(steps >> 4, 2, 1),
      "low": bits.fold(steps & 15, 4, 1),
    }
    return scales | self.pack_codes(codes.reshape(x.shape))

  def pack_codes(self, codes):
    return {"codes": bits.fold(codes, 4, 16)}
