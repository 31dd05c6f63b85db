"""ggml's k-quants: blocks of 256 weights whose groups' scales are codes too.

A block has one or two float16 scales of scales; groups of 16 or 32 weights have
scales, and maybe offsets, of 4 to 8 bits. Encoders search for the scales
(`numerics.searches`), round those, and then compute the codes anew for
what the rounded ones mean. With importances (an imatrix) errors are weighted by
them, as by `llama-quantize`.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from research.quant.format import Parts, Plain
from research.quant.ggml_format import (
  Field,
  SuperBlock,
  flat,
  groups,
  half,
  joined,
  weighted,
)
from research.quant.numerics import ggml_bits as bits
from research.quant.numerics import scale_search

F = np.float32


def _wide(x: Any) -> Any:
  return x.astype(np.float32)


def _recoded(x, scale, offset, top, low, kept):
  """Returns the codes `clip(round((x + offset) / scale), low, top) - low`.

  Args:
    x: groups, `[X, G, n, O]`.
    scale, offset: what is stored of them, `[X, G, O]`; offset may be None.
    top, low: of the codes before `low` is taken from them.
    kept: codes of the search, which stay where the scale is 0.
  """
  empty = (scale == 0)[..., None, :]
  scale = np.where(empty, F(1), scale[..., None, :])
  codes = x if offset is None else x + offset[..., None, :]
  codes = np.rint(codes / scale)
  codes = np.minimum(np.maximum(codes, F(low)), F(top)) - F(low)
  return flat(np.where(empty, kept, codes.astype(np.uint8)))


def _share(x, top):
  """Returns (codes, scale) of numbers from 0 on, the largest as code `top`."""
  most = np.maximum(x.max(-2), F(0))
  scale = np.where(most > 0, F(top) / np.where(most > 0, most, F(1)), F(0))
  codes = np.rint(scale[..., None, :] * x)
  return np.minimum(codes, F(top)).astype(np.uint8), most / F(top)


def _scales(x, weight, scale, drop, top):
  """Returns (codes, codes, scale, scale) of groups' scales and offsets.

  Args:
    x: the groups.
    weight: of their errors where there are importances, else None.
    scale, drop: `[X, G, O]`.
    top: the largest code.
  """
  if weight is None:
    a, d = _share(scale, top)
    b, least = _share(drop, top)
  else:
    sums = scale_search.total(weight)
    d, a = scale_search.positive(scale, sums, top)
    least, b = scale_search.positive(drop, sums, top)
  return a, b, d, least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Q2K(SuperBlock):
  """2 bits, groups of 16 with a scale and an offset of 4 bits: 2.625 bits."""

  kind: ClassVar[str] = "Q2_K"
  fields: ClassVar[tuple[Field, ...]] = (
    Field("scales", "u1", 16),
    Field("codes", "u1", 64),
    Field("scale", "<f2"),
    Field("drop", "<f2"),
  )

  def plain(self, parts: Parts) -> Plain:
    codes = bits.unfold(parts["codes"], 2, 32)
    d, least = (_wide(parts[k])[..., None, :] for k in ("scale", "drop"))
    both = parts["scales"]
    return Plain(
      codes=joined(codes),
      scale=joined(d * _wide(both & 15)),
      offset=joined(-(least * _wide(both >> 4))),
      group=16,
      bits=2,
    )

  def blocks(self, x, weight, mean):
    xs = groups(x, 16)
    if weight is None:
      scale, drop, kept = scale_search.affine(
        xs, np.abs(xs), 3, (-0.5, 0.1, 15), absolute=True
      )
      ws = None
    else:
      ws = weighted(x, weight, 16, 1.0)
      scale, drop, kept = scale_search.affine(xs, ws, 3, (-0.9, 0.05, 36))
    a, b, d, least = _scales(xs, ws, scale, drop, 15)
    (d, d32), (least, least32) = half(d), half(least)
    codes = _recoded(xs, d32[:, None] * a, least32[:, None] * b, 3, 0, kept)
    scales = {"scales": a | b << 4, "scale": d, "drop": least}
    return scales | self.packed(codes)

  def packed(self, codes):
    return {"codes": bits.fold(codes, 2, 32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Q3K(SuperBlock):
  """3 bits, groups of 16 with a signed scale of 6 bits: 3.4375 bits."""

  kind: ClassVar[str] = "Q3_K"
  fields: ClassVar[tuple[Field, ...]] = (
    Field("high", "u1", 32),
    Field("codes", "u1", 64),
    Field("scales", "u1", 12),
    Field("scale", "<f2"),
  )

  def plain(self, parts: Parts) -> Plain:
    codes = bits.unfold(parts["codes"], 2, 32)
    codes = codes | bits.unfold(parts["high"], 1, 32) << 2
    scales = _wide(bits.unfold_sixes(parts["scales"])) - F(32)
    return Plain(
      codes=joined(codes),
      scale=joined(_wide(parts["scale"])[..., None, :] * scales),
      group=16,
      zero=4.0,
      bits=3,
    )

  def blocks(self, x, weight, mean):
    xs = groups(x, 16)
    if weight is None:
      scale, kept = scale_search.descended(xs, 4)
      most = scale_search.extreme(scale)
      inverse = F(-32) / np.where(most == 0, F(1), most)
      a = np.rint(inverse[..., None, :] * scale)
      a = (np.minimum(np.maximum(a, F(-32)), F(31)) + F(32)).astype(np.uint8)
      a = np.where((most == 0)[..., None, :], 0, a).astype(np.uint8)
      d = np.where(most == 0, F(0), F(1) / inverse)
    else:
      ws = weighted(x, weight, 16)
      scale, kept = scale_search.symmetric(xs, 4, ws)
      d, a = scale_search.symmetric(scale, 32, scale_search.total(ws))
    d, d32 = half(d)
    found = d32[:, None] * (a.astype(np.float32) - F(32))
    codes = _recoded(xs, found, None, 3, -4, kept)
    scales = {"scales": bits.fold_sixes(a), "scale": d}
    return scales | self.packed(codes)

  def packed(self, codes):
    return {
      "high": bits.fold(codes >> 2, 1, 32),
      "codes": bits.fold(codes & 3, 2, 32),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Q4K(SuperBlock):
  """4 bits, groups of 32 with a scale and an offset of 6 bits: 4.5 bits."""

  kind: ClassVar[str] = "Q4_K"
  fields: ClassVar[tuple[Field, ...]] = (
    Field("scale", "<f2"),
    Field("drop", "<f2"),
    Field("scales", "u1", 12),
    Field("codes", "u1", 128),
  )
  trials: ClassVar[tuple[float, float, int]] = (-1.0, 0.1, 20)
  top: ClassVar[int] = 15

  def plain(self, parts: Parts) -> Plain:
    a, b = bits.unfold_pairs(parts["scales"])
    d, least = (_wide(parts[k])[..., None, :] for k in ("scale", "drop"))
    return Plain(
      codes=joined(self.apart(parts)),
      scale=joined(d * _wide(a)),
      offset=joined(-(least * _wide(b))),
      group=32,
      bits=self.top.bit_length(),
    )

  def apart(self, parts: Parts) -> Any:
    """Returns the codes of blocks, `[..., X, 256, O]`."""
    return bits.unfold(parts["codes"], 4, 32)

  def packed(self, codes):
    return {"codes": bits.fold(codes, 4, 32)}

  def blocks(self, x, weight, mean):
    xs = groups(x, 32)
    if weight is None:
      root = np.sqrt(scale_search.total(xs * xs) / F(32))
      errors = root[..., None, :] + np.abs(xs)
      scale, drop, kept = scale_search.affine(xs, errors, self.top, self.trials)
      ws = None
    else:
      ws = weighted(x, weight, 32)
      scale, drop, kept = scale_search.affine(
        xs, ws, self.top, (-0.9, 0.05, 36)
      )
    a, b, d, least = _scales(xs, ws, scale, drop, 63)
    (d, d32), (least, least32) = half(d), half(least)
    codes = _recoded(
      xs, d32[:, None] * a, least32[:, None] * b, self.top, 0, kept
    )
    scales = bits.fold_pairs(a, b)
    return {"scale": d, "drop": least, "scales": scales} | self.packed(codes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Q5K(Q4K):
  """5 bits, otherwise as `Q4K`: 5.5 bits."""

  kind: ClassVar[str] = "Q5_K"
  fields: ClassVar[tuple[Field, ...]] = (
    *Q4K.fields[:3],
    Field("high", "u1", 32),
    Q4K.fields[3],
  )
  trials: ClassVar[tuple[float, float, int]] = (-0.5, 0.1, 15)
  top: ClassVar[int] = 31

  def apart(self, parts: Parts) -> Any:
    return super().apart(parts) | bits.unfold(parts["high"], 1, 32) << 4

  def packed(self, codes):
    high = bits.fold(codes >> 4, 1, 32)
    return super().packed(codes & 15) | {"high": high}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Q6K(SuperBlock):
  """6 bits, groups of 16 with a signed scale of 8 bits: 6.5625 bits."""

  kind: ClassVar[str] = "Q6_K"
  fields: ClassVar[tuple[Field, ...]] = (
    Field("codes", "u1", 128),
    Field("high", "u1", 64),
    Field("scales", "i1", 16),
    Field("scale", "<f2"),
  )

  def plain(self, parts: Parts) -> Plain:
    codes = bits.unfold(parts["codes"], 4, 64)
    codes = codes | bits.unfold(parts["high"], 2, 32) << 4
    scale = _wide(parts["scale"])[..., None, :] * _wide(parts["scales"])
    return Plain(
      codes=joined(codes), scale=joined(scale), group=16, zero=32.0, bits=6
    )

  def blocks(self, x, weight, mean):
    xs = groups(x, 16)
    ws = None if weight is None else groups(weight, 16)
    scale, kept = scale_search.symmetric(xs, 32, ws)
    most = scale_search.extreme(scale)
    empty = np.abs(most) < scale_search.EMPTY
    inverse = F(-128) / np.where(empty, F(1), most)
    a = np.minimum(np.rint(inverse[..., None, :] * scale), F(127))
    a = np.where(empty[..., None, :], 0, a).astype(np.int8)
    d, d32 = half(np.where(empty, F(0), F(1) / inverse))
    found = d32[:, None] * a.astype(np.float32)
    codes = _recoded(xs, found, None, 31, -32, kept)
    # Such a block is all zeros, its codes too.
    codes = np.where(empty[..., None, :], np.uint8(0), codes)
    return {"scales": a, "scale": d} | self.packed(codes)

  def packed(self, codes):
    return {
      "codes": bits.fold(codes & 15, 4, 64),
      "high": bits.fold(codes >> 4, 2, 32),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Q8K(SuperBlock):
  """8 bits with a float32 scale, what ggml rounds activations to."""

  kind: ClassVar[str] = "Q8_K"
  fields: ClassVar[tuple[Field, ...]] = (
    Field("scale", "<f4"),
    Field("codes", "i1", 256),
    Field("sums", "<i2", 16),
  )

  def plain(self, parts: Parts) -> Plain:
    return Plain(
      codes=joined(parts["codes"]), scale=parts["scale"], group=256, bits=8
    )

  def blocks(self, x, weight, mean):
    most = scale_search.extreme(x)
    inverse = F(-127) / np.where(most == 0, F(1), most)
    codes = np.minimum(np.rint(inverse[..., None, :] * x), F(127))
    scale = np.where(most == 0, F(0), F(1) / inverse)
    return {"scale": scale} | self.packed(codes.astype(np.int8))

  def packed(self, codes):
    sums = groups(codes, 16).sum(-2, dtype=np.int16)
    return {"codes": codes, "sums": sums}
