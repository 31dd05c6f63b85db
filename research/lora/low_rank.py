"""LoRA's product `x aᵀ b` with a custom backward pass that XLA compiles well.

Layout: for a logical `w [in, out]`, `a [r, in]` and `b [r, out]`. Both factors
have the rank first, so that their gradients are `[r, tokens] x
[tokens, width]` matmuls, which do not transpose activations.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from research import sharding
from research.typing import Array, Float


def _flat(x: Float[Array, "..."]) -> Float[Array, "..."]:
  return x.reshape(-1, x.shape[-1])


def _outer(
  z: Float[Array, "*B R"], x: Float[Array, "*B I"]
) -> Float[Array, "R I"]:
  """Returns the sum over all rows of the outer products, in fp32."""
  return jnp.einsum("...r,...i->ri", z, x, preferred_element_type=jnp.float32)


def _flat_outers(*pairs):
  """Returns summed outer products of (thin, wide, dtype) triples."""
  # The barrier keeps the small operand the transposed one; without it XLA
  # rewrites the product to transpose the activations (15 times slower).
  thin = jax.lax.optimization_barrier([_flat(z).T for z, _, _ in pairs])
  f32 = jnp.float32
  return [
    jnp.dot(zt, _flat(x), preferred_element_type=f32).astype(dtype)
    for zt, (_, x, dtype) in zip(thin, pairs, strict=True)
  ]


@jax.custom_vjp
def low_rank(
  x: Float[Array, "*B I"], a: Float[Array, "R I"], b: Float[Array, "R O"]
) -> Float[Array, "*B O"]:
  """Returns `x aᵀ b` in the dtype of `x`."""
  z = jnp.einsum("...i,ri->...r", x, a.astype(x.dtype))
  return jnp.einsum("...r,ro->...o", z, b.astype(x.dtype))


def _low_rank_fwd(x, a, b):
  z = jnp.einsum("...i,ri->...r", x, a.astype(x.dtype))
  z = checkpoint_name(z, "thin")
  y = jnp.einsum("...r,ro->...o", z, b.astype(x.dtype))
  return y, (x, z, a, b)


def _low_rank_bwd(saved, dy):
  x, z, a, b = saved
  dz = jnp.einsum("...o,ro->...r", dy, b.astype(dy.dtype))
  dx = jnp.einsum("...r,ri->...i", dz, a.astype(dy.dtype))
  if sharding.is_cut():
    # Batch and length may both be sharded, which a flat token axis cannot be.
    return dx, _outer(dz, x).astype(a.dtype), _outer(z, dy).astype(b.dtype)
  return dx, *_flat_outers((dz, x, a.dtype), (z, dy, b.dtype))


low_rank.defvjp(_low_rank_fwd, _low_rank_bwd)


@jax.custom_vjp
def low_rank_after(
  x: Float[Array, "*B I"], a: Float[Array, "R I"], b: Float[Array, "R O"]
) -> Float[Array, "*B O"]:
  """Returns `low_rank(x, a, b)` for a fixed `a`, whose gradient is zero.

  The backward pass saves `x aᵀ` instead of `x`.
  """
  return low_rank(x, a, b)


def _low_rank_after_fwd(x, a, b):
  y, (_, z, _, _) = _low_rank_fwd(x, a, b)
  return y, (z, a, b)


def _low_rank_after_bwd(saved, dy):
  z, a, b = saved
  dz = jnp.einsum("...o,ro->...r", dy, b.astype(dy.dtype))
  dx = jnp.einsum("...r,ri->...i", dz, a.astype(dy.dtype))
  if sharding.is_cut():
    return dx, jnp.zeros_like(a), _outer(z, dy).astype(b.dtype)
  return dx, jnp.zeros_like(a), *_flat_outers((z, dy, b.dtype))


low_rank_after.defvjp(_low_rank_after_fwd, _low_rank_after_bwd)


def orthonormal_distance(x: Float[Array, "*E R N"]) -> Float[Array, "*E"]:
  """Returns the Frobenius norm of `x xᵀ - 1`."""
  gram = jnp.einsum("...rn,...sn->...rs", x, x) - jnp.eye(x.shape[-2])
  square = jnp.sum(jnp.square(gram), (-2, -1))
  # The gradient of a square root at 0 is NaN.
  return jnp.sqrt(jnp.maximum(square, jnp.finfo(x.dtype).tiny))
