"""Integers of 2 to 8 bits on an even grid, with a scale and a zero a group.

    weight = (code - zero) * scale,  0 <= code < 2**bits

Four definitions of a symmetric scale circulate, see `RULES`; a symmetric zero
is `2**(bits - 1)`. The scale is rounded to what it is stored in before codes
are computed.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from research.quant.format import Format, Parts, Plain
from research.quant.layouts import packing
from research.quant.numerics import exact_division
from research.typing import Array, Float, Shaped, UInt8, UserError

RULES = {
  "amax/qmax": "codes -7..7 of 4 bits: QuaRot, AWQ, SmoothQuant",
  "2amax/Q": "amax / 7.5, codes -8..7: GPTQ, compressed-tensors, qwix",
  "signed": "the largest magnitude, with its sign, at code 0: ggml's Q4_0",
}
"""Rules for the scale of a symmetric grid, and who has them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affine(Format):
  """An even grid.

  Attributes:
    block: weights of a group; 0 for all inputs of an output.
    bits: of a code, 2 to 8.
    symmetric: whether the zero is the middle code.
    rule: of a symmetric scale, one of `RULES`.
    zero: of an asymmetric grid: `"int"`, a code; `"float"`, any number.
    scale_dtype: what scales, and zeros of `"float"`, are stored in.
  """

  bits: int = 4
  symmetric: bool = False
  rule: str = "2amax/Q"
  zero: Literal["int", "float"] = "int"
  scale_dtype: str = "float16"

  def __post_init__(self):
    if not 2 <= self.bits <= 8:
      raise UserError(f"Affine: bits is {self.bits}, expected 2 to 8")
    if self.rule not in RULES:
      raise UserError(
        f"Affine: rule is {self.rule!r}, expected one of {', '.join(RULES)}"
      )
    if self.block:
      packing.check(self.block, self.bits, "Affine")

  @property
  def name(self) -> str:
    kind = "sym" if self.symmetric else "asym"
    return f"int{self.bits}-{kind}-g{self.block or 'all'}"

  @property
  def top(self) -> int:
    """Returns the largest code."""
    return 2**self.bits - 1

  @property
  def middle(self) -> float:
    """Returns the zero of a symmetric grid."""
    return float(2 ** (self.bits - 1))

  @property
  def local(self) -> bool:
    return True

  def layout(self) -> dict[str, str]:
    layout = {"codes": "x.o", "scale": "xo"}
    return layout if self.symmetric else layout | {"zero": "xo"}

  def fitted(self, inputs: int, outputs: int) -> "Affine":
    if not self.block:
      return dataclasses.replace(self, block=inputs)
    return super().fitted(inputs, outputs)

  def grid(
    self, w: Float[Array, "*B S O"]
  ) -> tuple[Float[Array, "*B O"], Float[Array, "*B O"] | float]:
    """Returns (scale, zero) of groups of `S` weights, float32.

    The scale is one that `scale_dtype` has. Symmetric: see `RULES`.
    Asymmetric: from min(w, 0) to max(w, 0), so that 0 is a code (GPTQ,
    Frantar et al. 2022, arXiv:2210.17323); zeros have the grid of [-1, 1].
    """
    if self.symmetric:
      scale = self._stored(self._symmetric(w))
      return scale, self.middle
    low = jnp.minimum(w.min(-2), 0)
    high = jnp.maximum(w.max(-2), 0)
    empty = low == high
    # Of any numbers: here 0 is a code either way.
    ends = (-1.0, 1.0) if self.zero == "int" else (0.0, float(self.top))
    low, high = jnp.where(empty, ends[0], low), jnp.where(empty, ends[1], high)
    scale = self._stored(exact_division.divided(high - low, self.top))
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
      scale = exact_division.divided(abs(w).max(-2), self.middle - 1)
    else:
      scale = exact_division.divided(2 * abs(w).max(-2), self.top)
    return jnp.where(scale == 0, 1.0, scale)

  def _stored(self, scale: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns what is left of scales in `scale_dtype`; never zero."""
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
    """Returns the nearest codes on a grid, as float32 integers."""
    shift = zero if isinstance(zero, float) else zero[..., None, :]
    x = exact_division.divided(w, scale[..., None, :])
    # An integer zero is added after rounding, which halves tell apart.
    if self.symmetric or self.zero == "int":
      return jnp.clip(jnp.round(x) + shift, 0, self.top)
    return jnp.clip(jnp.round(x + shift), 0, self.top)

  def values(
    self,
    codes: Float[Array, "*B S O"],
    scale: Float[Array, "*B O"],
    zero: Float[Array, "*B O"] | float,
  ) -> Float[Array, "*B S O"]:
    """Returns what codes on a grid stand for, float32."""
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
    """Returns the arrays that are kept of codes on a grid."""
    kept: Any = None
    if not self.symmetric:
      kind = self.scale_dtype if self.zero == "float" else jnp.uint8
      kept = jnp.asarray(zero).astype(kind)
    return self.kept(
      codes.astype(jnp.uint8), scale.astype(self.scale_dtype), kept
    )

  def kept(
    self,
    codes: UInt8[Array, "*B X S O"] | np.ndarray,
    scale: Float[Array, "*B X O"] | np.ndarray,
    zero: Shaped[Array, "*B X O"] | np.ndarray | None = None,
  ) -> dict[str, Any]:
    """Returns the parts of codes, scales and zeros that are as stored.

    Args:
      codes: below `2**bits`; arrays of NumPy give ones of NumPy.
      scale: in `scale_dtype`.
      zero: uint8 for `"int"`, else in `scale_dtype`; None of symmetric grids.
    """
    parts = {"codes": packing.pack(codes, self.bits), "scale": scale}
    if zero is not None:
      parts["zero"] = packing.pack_pairs(zero) if self._paired else zero
    return parts

  def recoded(self, parts: Parts, codes: UInt8[Array, "I O"]) -> dict[str, Any]:
    """Returns parts with other codes on the same grids."""
    size = self.block or len(codes)
    groups = codes.reshape(-1, size, codes.shape[-1])
    return dict(parts) | {"codes": packing.pack(groups, self.bits)}

  @property
  def _paired(self) -> bool:
    """Whether a byte holds two zeros."""
    return self.zero == "int" and self.bits <= 4

  def plain(self, parts: Parts) -> Plain:
    codes = packing.unpack(parts["codes"], self.bits)
    *lead, x, size, outputs = codes.shape
    zero: Any = self.middle
    if not self.symmetric:
      zero = parts["zero"]
      if self._paired:
        zero = packing.unpack_pairs(zero)[..., :x, :]
    return Plain(
      codes=codes.reshape(*lead, x * size, outputs),
      scale=parts["scale"],
      group=size,
      zero=zero,
      bits=self.bits,
    )
