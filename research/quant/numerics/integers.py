"""Integer matrix products: codes of activations times codes of weights."""

from typing import Any

import jax.numpy as jnp

from research.quant.format import NormalForm
from research.quant.qtensor import QTensor
from research.typing import Array, Float, Int8


def integer_product(
  x: Int8[Array, "*B I"], w: NormalForm
) -> Float[Array, "*B O"]:
  """Returns codes times a quantized matrix, summed in int32 within groups.

  Args:
    x: codes of activations, without their scales.
    w: one matrix in normal form, without a codebook.
  """
  # Shift uint8 codes to int8; the rest of the zero point enters as a multiple
  # of the activations' sum.
  middle = 2 ** (w.bits - 1) if w.codes.dtype == jnp.uint8 else 0
  inputs, outputs = w.codes.shape
  codes = (w.codes.astype(jnp.int32) - middle).astype(jnp.int8)
  codes = codes.reshape(-1, w.group, outputs)
  x = x.reshape(*x.shape[:-1], inputs // w.group, w.group)
  sums = jnp.einsum(
    "...gj,gjo->...go", x, codes, preferred_element_type=jnp.int32
  )
  scale = w.scale.astype(jnp.float32)
  y = jnp.einsum("...go,go->...o", sums.astype(jnp.float32), scale)
  fixed = isinstance(w.zero, float)
  if w.offset is None and fixed and w.zero == middle:
    return y
  zero = w.zero if fixed else w.zero.astype(jnp.float32)
  shift = scale * (middle - zero)
  shift = shift if w.offset is None else shift + w.offset
  total = jnp.sum(x, axis=-1, dtype=jnp.int32).astype(jnp.float32)
  return y + jnp.einsum("...g,go->...o", total, shift)


def integer_codes(w: Any) -> NormalForm | None:
  """Returns a weight's integer codes in normal form.

  None for a codebook, permuted or outlier rows, or a weight that is not packed.
  """
  if not isinstance(w, QTensor) or w.axis != -2:
    return None
  if w.order is not None or w.outliers is not None:
    return None
  plain = w.normal_form()
  return plain if plain.codebook is None else None
