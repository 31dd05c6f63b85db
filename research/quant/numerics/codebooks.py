"""4-bit codebooks NF4, FP4 and AF4, with encoding and look-up.

NF4: Dettmers et al. 2023 (arXiv:2305.14314), appendix E; quantiles of a normal
distribution, asymmetric so that zero is a value. FP4: sign, two exponent bits,
one mantissa bit, in bitsandbytes' order and scale (not those of OCP's E2M1).
Both equal bitsandbytes 0.50 bit for bit. AF4: minimises the rounding error for
blocks of 64 (Yoshida 2023, arXiv:2306.06965).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.typing import Array, Float, UInt8

NF4 = (
  *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
  *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
  *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
  *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
  *(0.7229568362236023, 1.0),
)

_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(s * m / 12 for s in (1.0, -1.0) for m in _MAGNITUDES)

AF4 = (
  *(-1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478),
  *(-0.04934812, 0.0, 0.04273164, 0.12934483, 0.21961274, 0.31675666),
  *(0.42563882, 0.55496234, 0.72424863, 1.0),
)

CODEBOOKS = {"nf4": NF4, "fp4": FP4, "af4": AF4}

TINY = np.float32(1e-38)
"""Smallest divisor in bitsandbytes."""


def table(kind: str) -> np.ndarray:
  """Returns the 16 values of a codebook, float32, indexed by code."""
  return np.asarray(CODEBOOKS[kind], np.float32)


def nearest(
  x: Float[Array, "..."] | np.ndarray, kind: str
) -> UInt8[Array, "..."] | np.ndarray:
  """Returns the code of the nearest value, uint8; ties go to the lower value.

  Args:
    x: within [-1, 1]; a NumPy array gives a NumPy array.
  """
  values = table(kind)
  # FP4 has two zeros: the stable sort puts the first one lower, and tiny
  # positive numbers get the second, as in bitsandbytes.
  order = np.argsort(values, kind="stable")
  ascending = values[order]
  between = (ascending[:-1] + ascending[1:]) / np.float32(2)
  # A sum of comparisons fuses and needs no array of 15 times the size.
  place = sum((x > t).astype(np.uint8) for t in between)
  if (order == np.arange(16)).all():
    return place
  return lookup(place, order.astype(np.uint8))


def lookup(codes: Any, values: Any) -> Any:
  """Returns `values[codes]`; for 16 values, by four selects per element.

  Vector units have selects but no fast gather.
  """
  if isinstance(codes, np.ndarray) and isinstance(values, np.ndarray):
    return values[codes]
  if len(values) != 16:
    return jnp.take(jnp.asarray(values), codes.astype(jnp.int32))
  # Without the barrier XLA broadcasts each value to an array outside of loops.
  codes, values = jax.lax.optimization_barrier((codes, jnp.asarray(values)))
  found = list(values)
  for bit in range(4):
    odd = (codes >> bit) & 1 == 1
    found = [
      jnp.where(odd, high, low)
      for low, high in zip(found[::2], found[1::2], strict=True)
    ]
  return found[0]


def inverse(top: Float[Array, "..."] | np.ndarray) -> Any:
  """Returns `1 / max(top, TINY)`, as bitsandbytes computes it."""
  if isinstance(top, np.ndarray):
    return np.float32(1) / np.maximum(top, TINY)
  # XLA may flush numbers as small as TINY to zero.
  least = jnp.finfo(jnp.float32).tiny
  return jnp.where(top >= least, 1 / jnp.maximum(top, least), 1 / TINY)


def magnitudes(
  x: Float[Array, " N"] | np.ndarray, block: int
) -> tuple[Any, Any]:
  """Returns each block's largest magnitude, and the numbers divided by it.

  Args:
    x: flat, float32; the last block may be shorter.
    block: number of elements per block.
  """
  xp = np if isinstance(x, np.ndarray) else jnp
  full = x.size - x.size % block
  blocks = x[:full].reshape(-1, block)
  top = abs(blocks).max(-1)
  unit = (blocks * inverse(top)[:, None]).reshape(-1)
  if full < x.size:
    # bitsandbytes divides a shorter block, and multiplies others by 1 / top.
    last = xp.maximum(abs(x[full:]).max(), TINY)
    top = xp.concatenate([top, last[None]])
    # Zeros stay zeros even if XLA flushes TINY to zero.
    rest = xp.where(x[full:] == 0, 0, x[full:] / xp.where(last > 0, last, 1))
    unit = xp.concatenate([unit, rest])
  return top, xp.clip(unit, -1, 1)


def nearest_of(unit: jax.Array | np.ndarray, values: np.ndarray) -> Any:
  """Returns the index of the nearest of ascending `values`, uint8.

  Ties go to the lower value."""
  between = (values[:-1] + values[1:]) / np.float32(2)
  if isinstance(unit, np.ndarray):
    return np.searchsorted(between, unit).astype(np.uint8)
  found = jnp.searchsorted(between, unit, method="scan_unrolled")
  return found.astype(jnp.uint8)
