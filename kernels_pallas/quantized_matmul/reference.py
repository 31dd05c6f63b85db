"""Reference matmul with packed weights: dequantizes all, then one einsum."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.quantized_matmul import planar
from kernels_pallas.quantized_matmul.cpu import panels
from kernels_pallas.quantized_matmul.cpu.panels import Panels
from kernels_pallas.quantized_matmul.planar import Planar


def reference_matmul(
  x: Float[Array, "*B I"], w: Panels | Planar
) -> Float[Array, "*B O"]:
  """Returns `x W` in the dtype of x, summed in at least float32."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  layout = panels if isinstance(w, Panels) else planar
  codes, scale, offset = layout.unpack(w)
  if w.bits == 4:
    codes = jnp.asarray(w.codebook, wide)[codes.astype(jnp.int32)]

  def repeated(part):
    return jnp.repeat(part.astype(wide), w.group, axis=-2)[: w.inputs]

  matrix = codes.astype(wide)
  if scale is not None:
    matrix = matrix * repeated(scale)
  if offset is not None:
    matrix = matrix + repeated(offset)
  y = jnp.einsum("...i,io->...o", x.astype(wide), matrix)
  return y.astype(x.dtype)
