"""Flash attention in plain lax for every platform, the xla_blockwise backend.

Never holds `[T, S]` scores of long sequences, forward or backward: it saves
the output and the log-sum-exp and recomputes probabilities, a tile at a time
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
  Queries,
  finished,
  kept,
  queries,
)
from kernels_pallas.flash_attention.spec import Operands, Spec
from kernels_pallas.flash_attention.xla import (
  blockwise_loops,
  blockwise_unrolled,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocked_attention(
  spec: Spec, x: Operands
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """Softmax attention (kernels.md 2.1) by blocks, with its own gradient.

  Differentiable in q, k, v, bias and sinks, through both results. Twice where
  `spec.blocks.unroll` admits the lengths.

  Args:
    spec: Static part.
    x: Arrays.

  Returns:
    The output in the dtype of q and the natural log-sum-exp of the logits
    (sinks included, before dropout); 0 and -inf where a query sees no key and
    there is no sink.
  """
  B, T, N, _ = x.q.shape
  o, lse = _organisation(spec, x).forward(spec, tiles.group(x))
  return (
    tiles.ungroup_queries(o).astype(spec.output or x.q.dtype),
    lse.reshape(B, N, T),
  )


def _forward(spec, x):
  return kept(x, *blocked_attention.__wrapped__(spec, x))


def _backward(spec, saved, cotangents):
  x, o, lse = saved
  rows = queries(x, o, lse, *cotangents)
  return (finished(x, blocked_gradients(spec, x, rows), rows),)


def blocked_gradients(spec: Spec, x: Operands, rows: Queries) -> Operands:
  """Gradients of q, k, v and bias in the accumulator dtype.

  Args:
    spec: Static part.
    x: Arrays; sinks are not looked at.
    rows: What the queries saw, these keys and perhaps others.
  """
  (B, T, N, _), K = x.q.shape, x.k.shape[2]
  shape = (B, K, N // K, T)
  dq, dk, dv, dbias = _organisation(spec, x).backward(
    spec,
    tiles.group(x),
    tiles.Cotangents(
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
  """The module whose loops suit the lengths."""
  T, S = x.q.shape[1], x.k.shape[1]
  q, limit = spec.blocks.q, spec.blocks.unroll
  short = max(T * q, min(q, T) * S) <= q * limit
  return blockwise_unrolled if short else blockwise_loops


blocked_attention.defvjp(_forward, _backward)
