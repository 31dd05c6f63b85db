"""Activations rounded to 8 bits, row by row."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from kernels_pallas.quantized_matmul.planar import Planar


def check_activations(activations: Any, w: Planar) -> None:
  """Raises ValueError unless rows may be rounded to such codes for `w`."""
  if activations is None:
    return
  if (jnp.dtype(activations), w.bits) != (jnp.int8, 8):
    raise ValueError(
      f"activations: found {jnp.dtype(activations)} with {w.bits}-bit codes, "
      "expected None, or int8 with 8-bit codes"
    )


def quantize_rows(
  x: Float[Array, "B I"],
) -> tuple[Int8[Array, "B I"], Float[Array, "B 1"]]:
  """Rounds rows to int8 codes, to nearest, ties to even; also returns the
  units.

  A row's largest number has code 127 (or -127); a unit is the value of code 1.
  """
  wide = x.astype(jnp.float32)
  unit = jnp.max(jnp.abs(wide), axis=1, keepdims=True) / 127
  codes = jnp.round(wide / jnp.where(unit == 0, 1, unit))
  return codes.astype(jnp.int8), unit
