"""ggml's k-quants (Q2_K to Q6_K, Q8_K): blocks of 256 with quantized scales.

A block has one or two float16 second-level scales; groups of 16 or 32 weights
have scales, and for some types offsets, of 4 to 8 bits. Encoders search for the
scales (`scale_search`), quantize them, and recompute codes for the quantized
scales. With importances (an imatrix) errors are weighted by them, as in
`llama-quantize`.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from research.quant.format import NormalForm, Parts
from research.quant.ggml_format import (
  Field,
  SuperBlock,
  error_weights,
  merge_blocks,
  merge_groups,
  split_groups,
  to_float16,
)
from research.quant.numerics import ggml_bits as bits
from research.quant.numerics import scale_search

F = np.float32


def _as_float32(x: Any) -> Any:
  return x.astype(np.float32)


def _recoded(x, scale, offset, top, low, kept):
  """Returns the codes `clip(round((x + offset) / scale), low, top) - low`.

  Args:
    x: groups, `[X, G, n, O]`.
    scale, offset: the stored, rounded values, `[X, G, O]`; offset may be None.
    top, low: range of the codes before `low` is subtracted.
    kept: codes of the search, used where the scale is 0.
  """
  empty = (scale == 0)[..., None, :]
  scale = np.where(empty, F(1), scale[..., None, :])
  codes = x if offset is None else x + offset[..., None, :]
  codes = np.rint(codes / scale)
  codes = np.minimum(np.maximum(codes, F(low)), F(top)) - F(low)
  return merge_groups(np.where(empty, kept, codes.astype(np.uint8)))


def _share(x, top):
  """Quantizes nonnegative numbers, the largest to code `top`.

  Returns (codes, scale)."""
  most = np.maximum(x.max(-2), F(0))
  scale = np.where(most > 0, F(top) / np.where(most > 0, most, F(1)), F(0))
  codes = np.rint(scale[..., None, :] * x)
  return np.minimum(codes, F(top)).astype(np.uint8), most / F(top)


def _scales(weight, scale, drop, top):
  """Quantizes groups' scales and offsets.

  Args:
    weight: weights of the groups' errors, or None without importances.
    scale, drop: `[X, G, O]`.

  Returns:
    (codes of scales, codes of offsets, scale of scales, scale of offsets).
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

  def normal_form(self, parts: Parts) -> NormalForm:
    codes = bits.unfold(parts["codes"], 2, 32)
    d, least = (_as_float32(parts[k])[..., None, :] for k in ("scale", "drop"))
    both = parts["scales"]
    return NormalForm(
      codes=merge_blocks(codes),
      scale=merge_blocks(d * _as_float32(both & 15)),
      offset=merge_blocks(-(least * _as_float32(both >> 4))),
      group=16,
      bits=2,
    )

  def blocks(self, x, weight, mean):
    xs = split_groups(x, 16)
    if weight is None:
      scale, drop, kept = scale_search.affine(
        xs, np.abs(xs), 3, (-0.5, 0.1, 15), absolute=True
      )
      ws = None
    else:
      ws = error_weights(x, weight, 16, 1.0)
      scale, drop, kept = scale_search.affine(xs, ws, 3, (-0.9, 0.05, 36))
    a, b, d, least = _scales(ws, scale, drop, 15)
    (d, d32), (least, least32) = to_float16(d), to_float16(least)
    codes = _recoded(xs, d32[:, None] * a, least32[:, None] * b, 3, 0, kept)
    scales = {"scales": a | b << 4, "scale": d, "drop": least}
    return scales | self.pack_codes(codes)

  def pack_codes(self, codes):
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

  def normal_form(self, parts: Parts) -> NormalForm:
    codes = bits.unfold(parts["codes"], 2, 32)
    codes = codes | bits.unfold(parts["high"], 1, 32) << 2
    scales = _as_float32(bits.unfold_sixes(parts["scales"])) - F(32)
    return NormalForm(
      codes=merge_blocks(codes),
      scale=merge_blocks(_as_float32(parts["scale"])[..., None, :] * scales),
      group=16,
      zero=4.0,
      bits=3,
    )

  def blocks(self, x, weight, mean):
    xs = split_groups(x, 16)
    if weight is None:
      scale, kept = scale_search.coordinate_descent(xs, 4)
      most = scale_search.extreme(scale)
      inverse = F(-32) / np.where(most == 0, F(1), most)
      a = np.rint(inverse[..., None, :] * scale)
      a = (np.minimum(np.maximum(a, F(-32)), F(31)) + F(32)).astype(np.uint8)
      a = np.where((most == 0)[..., None, :], 0, a).astype(np.uint8)
      d = np.where(most == 0, F(0), F(1) / inverse)
    else:
      ws = error_weights(x, weight, 16)
      scale, kept = scale_search.symmetric(xs, 4, ws)
      d, a = scale_search.symmetric(scale, 32, scale_search.total(ws))
    d, d32 = to_float16(d)
    found = d32[:, None] * (a.astype(np.float32) - F(32))
    codes = _recoded(xs, found, None, 3, -4, kept)
    scales = {"scales": bits.fold_sixes(a), "scale": d}
    return scales | self.pack_codes(codes)

  def pack_codes(self, codes):
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

  def normal_form(self, parts: Parts) -> NormalForm:
    a, b = bits.unfold_pairs(parts["scales"])
    d, least = (_as_float32(parts[k])[..., None, :] for k in ("scale", "drop"))
    return NormalForm(
      codes=merge_blocks(self.unpack_codes(parts)),
      scale=merge_blocks(d * _as_float32(a)),
      offset=merge_blocks(-(least * _as_float32(b))),
      group=32,
      bits=self.top.bit_length(),
    )

  def unpack_codes(self, parts: Parts) -> Any:
    """Unpacks the codes of blocks, `[..., X, 256, O]`."""
    return bits.unfold(parts["codes"], 4, 32)

  def pack_codes(self, codes):
    return {"codes": bits.fold(codes, 4, 32)}

  def blocks(self, x, weight, mean):
    xs = split_groups(x, 32)
    if weight is None:
      root = np.sqrt(scale_search.total(xs * xs) / F(32))
      errors = root[..., None, :] + np.abs(xs)
      scale, drop, kept = scale_search.affine(xs, errors, self.top, self.trials)
      ws = None
    else:
      ws = error_weights(x, weight, 32)
      scale, drop, kept = scale_search.affine(
        xs, ws, self.top, (-0.9, 0.05, 36)
      )
    a, b, d, least = _scales(ws, scale, drop, 63)
    (d, d32), (least, least32) = to_float16(d), to_float16(least)
    codes = _recoded(
      xs, d32[:, None] * a, least32[:, None] * b, self.top, 0, kept
    )
    scales = bits.fold_pairs(a, b)
    return {"scale": d, "drop": least, "scales": scales} | self.pack_codes(
      codes
    )


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

  def unpack_codes(self, parts: Parts) -> Any:
    return super().unpack_codes(parts) | bits.unfold(parts["high"], 1, 32) << 4

  def pack_codes(self, codes):
    high = bits.fold(codes >> 4, 1, 32)
    return super().pack_codes(codes & 15) | {"high": high}


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

  def normal_form(self, parts: Parts) -> NormalForm:
    codes = bits.unfold(parts["codes"], 4, 64)
    codes = codes | bits.unfold(parts["high"], 2, 32) << 4
    scale = _as_float32(parts["scale"])[..., None, :] * _as_float32(
      parts["scales"]
    )
    return NormalForm(
      codes=merge_blocks(codes),
      scale=merge_blocks(scale),
      group=16,
      zero=32.0,
      bits=6,
    )

  def blocks(self, x, weight, mean):
    xs = split_groups(x, 16)
    ws = None if weight is None else split_groups(weight, 16)
    scale, kept = scale_search.symmetric(xs, 32, ws)
    most = scale_search.extreme(scale)
    empty = np.abs(most) < scale_search.EMPTY
    inverse = F(-128) / np.where(empty, F(1), most)
    a = np.minimum(np.rint(inverse[..., None, :] * scale), F(127))
    a = np.where(empty[..., None, :], 0, a).astype(np.int8)
    d, d32 = to_float16(np.where(empty, F(0), F(1) / inverse))
    found = d32[:, None] * a.astype(np.float32)
    codes = _recoded(xs, found, None, 31, -32, kept)
    # A block of zeros has codes 0.
    codes = np.where(empty[..., None, :], np.uint8(0), codes)
    return {"scales": a, "scale": d} | self.pack_codes(codes)

  def pack_codes(self, codes):
    return {
      "codes": bits.fold(codes & 15, 4, 64),
      "high": bits.fold(codes >> 4, 2, 32),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Q8K(SuperBlock):
  """8 bits with a float32 scale; ggml's format of quantized activations."""

  kind: ClassVar[str] = "Q8_K"
  fields: ClassVar[tuple[Field, ...]] = (
    Field("scale", "<f4"),
    Field("codes", "i1", 256),
    Field("sums", "<i2", 16),
  )

  def normal_form(self, parts: Parts) -> NormalForm:
    return NormalForm(
      codes=merge_blocks(parts["codes"]),
      scale=parts["scale"],
      group=256,
      bits=8,
    )

  def blocks(self, x, weight, mean):
    most = scale_search.extreme(x)
    inverse = F(-127) / np.where(most == 0, F(1), most)
    codes = np.minimum(np.rint(inverse[..., None, :] * x), F(127))
    scale = np.where(most == 0, F(0), F(1) / inverse)
    return {"scale": scale} | self.pack_codes(codes.astype(np.int8))

  def pack_codes(self, codes):
    sums = split_groups(codes, 16).sum(-2, dtype=np.int16)
    return {"codes": codes, "sums": sums}
