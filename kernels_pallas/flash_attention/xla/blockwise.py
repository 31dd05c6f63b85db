"""Blockwise flash attention in plain lax, on every platform: xla_blockwise.

Never materialises `[T, S]` scores of long sequences, forward or backward: it
saves the output and the log-sum-exp and recomputes probabilities tile by tile
(Dao et al. 2022, "FlashAttention"; Dao 2023, "FlashAttention-2"). The saved
arrays are named 'attn_out' and 'attn_lse' for `jax.checkpoint` policies, so
that a rematerialised layer need not run attention twice.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.flash_attention import tiles
from kernels_pallas.flash_attention.cotangents import (
  QueryCotangents,
  cast_gradients,
  query_cotangents,
  save_residuals,
)
from kernels_pallas.flash_attention.spec import Operands, Spec
from kernels_pallas.flash_attention.xla import (
  blockwise_loops,
  blockwise_unrolled,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blockwise_attention(
  spec: Spec, x: Operands
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """Softmax attention by blocks, with a custom gradient.

  kernels_pallas/MATH.md 1 and 3 have the definition and the gradients.
  Differentiable in q, k, v, bias and sinks, through both results; twice
  differentiable if the lengths are within `spec.blocks.unroll`.

  Args:
    spec: Static part.
    x: Arrays.

  Returns:
    The output in the dtype of q and the natural log-sum-exp of the logits
    (sinks included, before dropout); 0 and -inf where a query sees no key and
    there is no sink.
  """
  B, T, N, _ = x.q.shape
  o, lse = _organisation(spec, x).forward(spec, tiles.group_heads(x))
  return (
    tiles.ungroup_queries(o).astype(spec.output or x.q.dtype),
    lse.reshape(B, N, T),
  )


def _forward(spec, x):
  return save_residuals(x, *blockwise_attention.__wrapped__(spec, x))


def _backward(spec, saved, cotangents):
  x, o, lse = saved
  rows = query_cotangents(x, o, lse, *cotangents)
  return (cast_gradients(x, blockwise_gradients(spec, x, rows), rows),)


def blockwise_gradients(
  spec: Spec, x: Operands, rows: QueryCotangents
) -> Operands:
  """Returns the gradients of q, k, v and bias in the accumulator dtype.

  Args:
    spec: Static part.
    x: Arrays; sinks are ignored.
    rows: Per-query inputs, computed over these keys and possibly others.
  """
  (B, T, N, _), K = x.q.shape, x.k.shape[2]
  shape = (B, K, N // K, T)
  dq, dk, dv, dbias = _organisation(spec, x).backward(
    spec,
    tiles.group_heads(x),
    tiles.TileCotangents(
      tiles.group_queries(rows.do, K),
      rows.lse.reshape(shape),
      rows.shift.reshape(shape),
    ),
  )
  return Operands(
    q=tiles.ungroup_queries(dq),
    k=jnp.swapaxes(dk, 1, 2),
    v=jnp.swapaxes(dv, 1, 2),
    mask=None,
    bias=dbias,
  )


def _organisation(spec: Spec, x: Operands):
  """Returns the module that implements these lengths."""
  T, S = x.q.shape[1], x.k.shape[1]
  q, limit = spec.blocks.q, spec.blocks.unroll
  short = max(T * q, min(q, T) * S) <= q * limit
  return blockwise_unrolled if short else blockwise_loops


blockwise_attention.defvjp(_forward, _backward)
