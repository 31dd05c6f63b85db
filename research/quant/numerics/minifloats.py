"""Minifloats of four, six and eight bits (FP8, MX): exact casts in NumPy, JAX.

A number is rounded to the nearest, ties to the even code, and saturates: larger
numbers and infinity become the largest finite number. Casts of JAX and
ml_dtypes do not saturate to E4M3 (465 becomes NaN) and round E8M0 to the
nearest power, which no rule for scales does, and XLA for CPUs (jax 0.12)
compiles no casts to six bits, so this module computes the bits; in range all
agree (`test_minifloats.py`). Every step is exact in float32; results do not
depend on the backend.

The formats are those of the OCP's FP8 (Micikevicius et al. 2022,
arXiv:2209.05433) and microscaling (Rouhani et al. 2023, arXiv:2310.10537).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.quant.numerics import exact_division
from research.typing import Array, Float, Int, UInt8

RULES = ("floor", "ceil", "rceil", "even")
"""Rules for a block's power of two, see `block_exponent`."""

BIAS = 127
"""Bias of E8M0: byte `b` means `2^(b - 127)`."""

NAN = 255
"""E8M0's byte for NaN."""


@dataclasses.dataclass(frozen=True)
class MiniFloat:
  """A floating-point format: a sign, `exponent` bits and `mantissa` bits.

  Attributes:
    top: code of the largest finite number.
    nan: code of a NaN; None if the format has none.
  """

  name: str
  exponent: int
  mantissa: int
  bias: int
  top: int
  nan: int | None = None

  @property
  def bits(self) -> int:
    return 1 + self.exponent + self.mantissa

  @property
  def max(self) -> float:
    return self.values[self.top]

  @property
  def emax(self) -> int:
    return (self.top >> self.mantissa) - self.bias

  @functools.cached_property
  def values(self) -> tuple[float, ...]:
    half = []
    for code in range(1 << (self.bits - 1)):
      power, rest = code >> self.mantissa, code & ((1 << self.mantissa) - 1)
      whole = rest + (1 << self.mantissa if power else 0)
      value = math.ldexp(whole, max(power, 1) - self.bias - self.mantissa)
      infinite = self.nan is not None and rest == 0
      beyond = math.inf if infinite else math.nan
      half.append(value if code <= self.top else beyond)
    return (*half, *(-value for value in half))

  @functools.cached_property
  def finite(self) -> tuple[float, ...]:
    """The value of each code, with NaN and infinity as the largest number."""
    return tuple(
      value
      if math.isfinite(value)
      else self.max * (1 if code < 1 << (self.bits - 1) else -1)
      for code, value in enumerate(self.values)
    )


E4M3 = MiniFloat("e4m3", 4, 3, 7, 0x7E, 0x7F)
E5M2 = MiniFloat("e5m2", 5, 2, 15, 0x7B, 0x7E)
E2M3 = MiniFloat("e2m3", 2, 3, 1, 0x1F)
E3M2 = MiniFloat("e3m2", 3, 2, 3, 0x1F)
E2M1 = MiniFloat("e2m1", 2, 1, 1, 0x07)

KINDS = {kind.name: kind for kind in (E4M3, E5M2, E2M3, E3M2, E2M1)}


def encode(
  x: Float[Array, "..."] | np.ndarray, kind: MiniFloat
) -> UInt8[Array, "..."] | np.ndarray:
  """Returns each number's code, uint8; a NumPy array gives a NumPy array.

  Args:
    x: any float dtype; a NaN becomes the format's NaN, or 0 if it has none.
  """
  xp = np if isinstance(x, np.ndarray) else jnp
  x = xp.asarray(x).astype(np.float32)
  size = xp.minimum(xp.abs(x), np.float32(kind.max))
  power = xp.maximum((_bits(size) >> 23) - 127, 1 - kind.bias)
  steps = xp.rint(size * power_of_two(kind.mantissa - power))
  missing = xp.isnan(x)
  steps = xp.where(missing, 0, steps).astype(np.int32)
  power = xp.where(missing, 1 - kind.bias, power)
  # A mantissa rounded up to the next power carries into the exponent.
  code = ((power + kind.bias - 1) << kind.mantissa) + steps
  code = xp.where(missing, kind.nan or 0, code)
  sign = xp.where(missing, 0, _bits(x) < 0).astype(np.int32)
  return (code | (sign << (kind.bits - 1))).astype(np.uint8)


def decode(
  codes: UInt8[Array, "..."] | np.ndarray, kind: MiniFloat
) -> Float[Array, "..."] | np.ndarray:
  """Returns the values of codes, float32, by arithmetic without a gather."""
  xp = np if isinstance(codes, np.ndarray) else jnp
  codes = xp.asarray(codes).astype(np.int32)
  sign = 1 - 2 * ((codes >> (kind.bits - 1)) & 1)
  code = codes & ((1 << (kind.bits - 1)) - 1)
  power = code >> kind.mantissa
  whole = code & ((1 << kind.mantissa) - 1)
  whole = whole + xp.where(power > 0, 1 << kind.mantissa, 0)
  scale = power_of_two(xp.maximum(power, 1) - kind.bias - kind.mantissa)
  value = whole.astype(np.float32) * scale
  if kind.nan is not None:
    infinite = (1 << kind.exponent) - 1 << kind.mantissa
    beyond = xp.where(code == infinite, np.float32(np.inf), np.float32(np.nan))
    value = xp.where(code > kind.top, beyond, value)
  return value * sign.astype(np.float32)


def block_exponent(
  top: Float[Array, "..."] | np.ndarray,
  kind: MiniFloat,
  rule: str = "floor",
) -> UInt8[Array, "..."] | np.ndarray:
  """Returns the E8M0 byte of a block's scale, from its largest magnitude.

  With `e` the exponent of the format's largest number:

    floor   2^(floor(log2 top) - e)       the specification; values between the
                                          largest number and the next power of
                                          two saturate
    ceil    2^(ceil(log2 top) - e)
    rceil   2^ceil(log2(top / max))       cuBLAS, qwix: nothing saturates
    even    floor, of `top` rounded to the element's mantissa

  Args:
    top: largest magnitudes; 0 gives the smallest scale, NaN the byte of NaN.
    rule: one of `RULES`.
  """
  xp = np if isinstance(top, np.ndarray) else jnp
  top = xp.asarray(top).astype(np.float32)
  bits = _bits(top)
  down = kind.emax
  if rule == "even":
    bits = bits + (1 << (22 - kind.mantissa))
  elif rule == "rceil":
    bits, down = _bits(exact_division.divide(top, kind.max)), 0
  power = bits >> 23
  if rule in ("ceil", "rceil"):
    power = power + ((bits & 0x7FFFFF) > 0)
  byte = xp.clip(power - down, 0, NAN - 1)
  return xp.where(xp.isnan(top), NAN, byte).astype(np.uint8)


def block_scale(
  byte: UInt8[Array, "..."] | np.ndarray,
) -> Float[Array, "..."] | np.ndarray:
  """Returns `2^(byte - 127)`, float32; XLA may flush the smallest one to 0."""
  xp = np if isinstance(byte, np.ndarray) else jnp
  byte = xp.asarray(byte).astype(np.int32)
  # The smallest value is subnormal: its one bit is in the mantissa.
  bits = xp.where(byte == 0, 1 << 22, byte << 23)
  return xp.where(byte == NAN, np.float32(np.nan), _floats(bits))


def divide_by_scale(
  x: Float[Array, "..."] | np.ndarray,
  byte: UInt8[Array, "..."] | np.ndarray,
) -> Float[Array, "..."] | np.ndarray:
  """Returns `x / 2^(byte - 127)`, float32, without subnormal factors."""
  xp = np if isinstance(x, np.ndarray) else jnp
  power = BIAS - xp.asarray(byte).astype(np.int32)
  first = power >> 1
  out = x * power_of_two(first) * power_of_two(power - first)
  return xp.where(byte == NAN, np.float32(np.nan), out)


def nearest_first(most: int) -> Int[Array, " N"]:
  """Returns search steps 0, -1, 1, -2, ..., so argmin prefers near ones."""
  steps = [0] + [sign * n for n in range(1, most + 1) for sign in (-1, 1)]
  return jnp.asarray(steps)


def power_of_two(power: Any) -> Any:
  """Returns `2^power`, float32, for int32 from -126 to 127."""
  return _floats((power + 127) << 23)


def _bits(x: Any) -> Any:
  if isinstance(x, np.ndarray | np.generic):
    return np.asarray(x, np.float32).view(np.int32)
  return jax.lax.bitcast_convert_type(x, jnp.int32)


def _floats(bits: Any) -> Any:
  if isinstance(bits, np.ndarray | np.generic):
    return np.asarray(bits, np.int32).view(np.float32)
  return jax.lax.bitcast_convert_type(bits.astype(jnp.int32), jnp.float32)
