"""Affine integer quantization of 2 to 8 bits, with a scale and zero per group.

    weight = (code - zero) * scale,  0 <= code < 2**bits

Implementations define the scale of a symmetric grid differently, see `RULES`;
a symmetric zero is `2**(bits - 1)`. Codes are computed from the stored, rounded
scale.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from research.quant.format import Format, NormalForm, Parts
from research.quant.layouts import packing
from research.quant.numerics import exact_division
from research.ranges import Between, OneOf
from research.typing import Array, Float, Shaped, UInt8

RULES = {
  "amax/qmax": "codes -7..7 of 4 bits: QuaRot, AWQ, SmoothQuant",
  "2amax/Q": "amax / 7.5, codes -8..7: GPTQ, compressed-tensors, qwix",
  "signed": "the largest magnitude, with its sign, at code 0: ggml's Q4_0",
}
"""Rules for the scale of a symmetric grid -> definition and users."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affine(Format):
  """A uniform integer grid per group.

  Attributes:
    block: weights per group; 0 for all inputs of an output.
    bits: bits of a code, 2 to 8.
    symmetric: whether the zero is the middle code.
    rule: rule for a symmetric scale, one of `RULES`.
    zero: zero of an asymmetric grid: `"int"`, a code; `"float"`, any number.
    scale_dtype: dtype of scales, and of `"float"` zeros.
  """

  bits: Between(2, 8) = 4
  symmetric: bool = False
  rule: OneOf(*RULES) = "2amax/Q"
  zero: Literal["int", "float"] = "int"
  scale_dtype: str = "float16"

  def __post_init__(self):
    super().__post_init__()
    if self.block:
      packing.check(self.block, self.bits, "Affine")

  @property
  def name(self) -> str:
    kind = "sym" if self.symmetric else "asym"
    return f"int{self.bits}-{kind}-g{self.block or 'all'}"

  @property
  def top(self) -> int:
    return 2**self.bits - 1

  @property
  def middle(self) -> float:
    return float(2 ** (self.bits - 1))

  @property
  def group_local(self) -> bool:
    return True

  def layout(self) -> dict[str, str]:
    layout = {"codes": "x.o", "scale": "xo"}
    return layout if self.symmetric else layout | {"zero": "xo"}

  def for_shape(self, inputs: int, outputs: int) -> "Affine":
    if not self.block:
      return dataclasses.replace(self, block=inputs)
    return super().for_shape(inputs, outputs)

  def grid(
    self, w: Float[Array, "*B S O"]
  ) -> tuple[Float[Array, "*B O"], Float[Array, "*B O"] | float]:
    """Returns (scale, zero) of groups of `S` weights, float32.

    The scale is representable in `scale_dtype`. Symmetric: see `RULES`.
    Asymmetric: from min(w, 0) to max(w, 0), so that 0 is a code (GPTQ,
    Frantar et al. 2022, arXiv:2210.17323); an all-zero group has the grid of
    [-1, 1].
    """
    if self.symmetric:
      scale = self._stored(self._symmetric(w))
      return scale, self.middle
    low = jnp.minimum(w.min(-2), 0)
    high = jnp.maximum(w.max(-2), 0)
    empty = low == high
    # An arbitrary range for all-zero groups; both have a code for 0.
    ends = (-1.0, 1.0) if self.zero == "int" else (0.0, float(self.top))
    low, high = jnp.where(empty, ends[0], low), jnp.where(empty, ends[1], high)
    scale = self._stored(exact_division.divide(high - low, self.top))
    zero = -low / scale
    if self.zero == "float":
      zero = zero.astype(self.scale_dtype).astype(jnp.float32)
    else:
      zero = jnp.clip(jnp.round(zero), 0, self.top)
    return scale, zero

  def _symmetric(self, w: Float[Array, "*B S O"]) -> Float[Array, "*B O"]:
    if self.rule == "signed":
      first = jnp.argmax(abs(w), axis=-2, keepdims=True)
      extreme = jnp.take_along_axis(w, first, axis=-2)[..., 0, :]
      scale = extreme / -self.middle
    elif self.rule == "amax/qmax":
      scale = exact_division.divide(abs(w).max(-2), self.middle - 1)
    else:
      scale = exact_division.divide(2 * abs(w).max(-2), self.top)
    return jnp.where(scale == 0, 1.0, scale)

  def _stored(self, scale: Float[Array, "*B"]) -> Float[Array, "*B"]:
    kind = jnp.finfo(self.scale_dtype)
    least = jnp.float32(kind.smallest_subnormal)
    least = jnp.maximum(least, jnp.finfo(jnp.float32).tiny)
    size = jnp.clip(abs(scale), least, jnp.float32(kind.max))
    rounded = jnp.where(scale < 0, -size, size).astype(self.scale_dtype)
    return rounded.astype(jnp.float32)

  def codes(
    self,
    w: Float[Array, "*B S O"],
    scale: Float[Array, "*B O"],
    zero: Float[Array, "*B O"] | float,
  ) -> Float[Array, "*B S O"]:
    shift = zero if isinstance(zero, float) else zero[..., None, :]
    x = exact_division.divide(w, scale[..., None, :])
    # An integer zero is added after rounding, which matters for ties.
    if self.symmetric or self.zero == "int":
      return jnp.clip(jnp.round(x) + shift, 0, self.top)
    return jnp.clip(jnp.round(x + shift), 0, self.top)

  def values(
    self,
    codes: Float[Array, "*B S O"],
    scale: Float[Array, "*B O"],
    zero: Float[Array, "*B O"] | float,
  ) -> Float[Array, "*B S O"]:
    shift = zero if isinstance(zero, float) else zero[..., None, :]
    return (codes - shift) * scale[..., None, :]

  def encode(
    self,
    w: Float[Array, "I O"] | np.ndarray,
    importance: Float[Array, " I"] | None = None,
  ) -> dict[str, Any]:
    del importance
    w = jnp.asarray(w).astype(jnp.float32)
    groups = w.reshape(-1, self.block or w.shape[0], w.shape[1])
    scale, zero = self.grid(groups)
    return self.parts(self.codes(groups, scale, zero), scale, zero)

  def parts(
    self,
    codes: Float[Array, "*B X S O"],
    scale: Float[Array, "*B X O"],
    zero: Float[Array, "*B X O"] | float,
  ) -> dict[str, Any]:
    kept: Any = None
    if not self.symmetric:
      kind = self.scale_dtype if self.zero == "float" else jnp.uint8
      kept = jnp.asarray(zero).astype(kind)
    return self.pack_parts(
      codes.astype(jnp.uint8), scale.astype(self.scale_dtype), kept
    )

  def pack_parts(
    self,
    codes: UInt8[Array, "*B X S O"] | np.ndarray,
    scale: Float[Array, "*B X O"] | np.ndarray,
    zero: Shaped[Array, "*B X O"] | np.ndarray | None = None,
  ) -> dict[str, Any]:
    """Packs codes, scales and zeros that already have their storage dtype.

    Args:
      codes: below `2**bits`; NumPy arrays give NumPy arrays.
      scale: in `scale_dtype`.
      zero: uint8 for `"int"`, else in `scale_dtype`; None for symmetric grids.
    """
    parts = {"codes": packing.pack(codes, self.bits), "scale": scale}
    if zero is not None:
      parts["zero"] = packing.pack_pairs(zero) if self._paired else zero
    return parts

  def with_codes(
    self, parts: Parts, codes: UInt8[Array, "I O"]
  ) -> dict[str, Any]:
    size = self.block or len(codes)
    groups = codes.reshape(-1, size, codes.shape[-1])
    return dict(parts) | {"codes": packing.pack(groups, self.bits)}

  @property
  def _paired(self) -> bool:
    """Whether a byte holds two zeros."""
    return self.zero == "int" and self.bits <= 4

  def normal_form(self, parts: Parts) -> NormalForm:
    codes = packing.unpack(parts["codes"], self.bits)
    *lead, x, size, outputs = codes.shape
    zero: Any = self.middle
    if not self.symmetric:
      zero = parts["zero"]
      if self._paired:
        zero = packing.unpack_pairs(zero)[..., :x, :]
    return NormalForm(
      codes=codes.reshape(*lead, x * size, outputs),
      scale=parts["scale"],
      group=size,
      zero=zero,
      bits=self.bits,
    )
