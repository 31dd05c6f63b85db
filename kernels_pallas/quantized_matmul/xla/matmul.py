"""Matmul with packed weights in plain lax: the xla backend.

Decodes as many panels at a time as fit into cache. Used on platforms without a
kernel, on CPUs without a C++ compiler, and for gradients everywhere.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.quantized_matmul.cpu import panels
from kernels_pallas.quantized_matmul.cpu.panels import LANES, Panels

PIECE = 2 << 20
"""Bytes of decoded panels at a time, which fit into a core's cache."""


def xla_matmul(x: Float[Array, "B I"], w: Panels) -> Float[Array, "B O"]:
  """Returns `x W` in the dtype of x, summed in float32."""
  x, w = jax.lax.optimization_barrier((x, w))
  x_padded = _padded(x, w.padded)

  def piece(part):
    matrix = panels.values(part).astype(x.dtype)
    return jnp.einsum(
      "bi,pil->bpl", x_padded, matrix, preferred_element_type=jnp.float32
    )

  y = jax.lax.map(piece, _pieces(w))  # [N, B, panels of a piece, 16]
  y = jnp.moveaxis(y, 0, 1).reshape(len(x), y.shape[0] * y.shape[2] * LANES)
  return y[:, : w.outputs].astype(x.dtype)


def xla_input_gradient(
  dy: Float[Array, "B O"], w: Panels
) -> Float[Array, "B I"]:
  """Returns `dy W^T` in the dtype of dy, summed in float32."""
  dy, w = jax.lax.optimization_barrier((dy, w))
  pieces = _pieces(w)
  count, each = pieces.words.shape[:2]
  slopes = _padded(dy, count * each * LANES).reshape(
    len(dy), count, each, LANES
  )

  def add(total, slopes_and_part):
    slope, part = slopes_and_part
    matrix = panels.values(part).astype(dy.dtype)
    return total + jnp.einsum(
      "bpl,pil->bi", slope, matrix, preferred_element_type=jnp.float32
    ), None

  zeros = jnp.zeros((len(dy), w.padded), jnp.float32)
  slopes = jnp.moveaxis(slopes, 1, 0)
  total, _ = jax.lax.scan(add, zeros, (slopes, pieces))
  return total[:, : w.inputs].astype(dy.dtype)


def _padded(x: Array, size: int) -> Array:
  return jnp.pad(x, ((0, 0), (0, size - x.shape[1])))


def _pieces(w: Panels) -> Panels:
  """Splits the panels into equal pieces on a new axis, zero-padded."""
  count = w.words.shape[0]
  each = max(1, min(count, PIECE // (4 * LANES * w.padded)))
  # A divisor avoids a copy; without a near one the last piece is padded.
  divisors = (n for n in range(each, each // 2, -1) if count % n == 0)
  each = next(divisors, each)
  cut = functools.partial(_cut, each=each, pad=-count % each)
  return jax.tree.map(cut, w)


def _cut(part: Array, each: int, pad: int) -> Array:
  if pad:
    part = jnp.pad(part, ((0, pad), (0, 0), (0, 0)))
  return part.reshape(-1, each, *part.shape[1:])
