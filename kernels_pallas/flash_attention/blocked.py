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
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from kernels_pallas.flash_attention import looped, tiles, unrolled
from kernels_pallas.flash_attention.spec import Operands, Spec, accumulator


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
    tiles.ungroup_queries(o).astype(x.q.dtype),
    lse.reshape(B, N, T),
  )


def _forward(spec, x):
  o, lse = blocked_attention.__wrapped__(spec, x)
  o = checkpoint_name(o, "attn_out")
  lse = checkpoint_name(lse, "attn_lse")
  return (o, lse), (x, o, lse)


def _backward(spec, saved, cotangents):
  x, o, lse = saved
  do, dlse = cotangents
  (B, T, N, _), K = x.q.shape, x.k.shape[2]
  dtype = accumulator(x.q.dtype)
  do = tiles.zero_padding(do, x.mask.live_queries())
  delta = jnp.sum(do.astype(dtype) * o.astype(dtype), axis=-1)
  # Rows without a key: P = exp(s - inf) = 0, and so are all gradients.
  empty = lse == -jnp.inf
  shift = delta.swapaxes(1, 2) - jnp.where(empty, 0, dlse)
  lse = jnp.where(empty, jnp.inf, lse)

  grouped = tiles.group(x)
  rows = (B, K, N // K, T)
  dq, dk, dv, dbias = _organisation(spec, x).backward(
    spec,
    grouped,
    tiles.Cotangents(
      tiles.group_queries(do, K), lse.reshape(rows), shift.reshape(rows)
    ),
  )
  dsinks = None
  if x.sinks is not None:
    share = jnp.exp(x.sinks.astype(dtype)[None, :, None] - lse)
    dsinks = -jnp.sum(share * shift, axis=(0, 2)).astype(x.sinks.dtype)
  if dbias is not None:
    dbias = dbias.reshape(x.bias.shape).astype(x.bias.dtype)
  gradients = Operands(
    q=tiles.ungroup_queries(dq).astype(x.q.dtype),
    k=jnp.swapaxes(dk, 1, 2).astype(x.k.dtype),
    v=jnp.swapaxes(dv, 1, 2).astype(x.v.dtype),
    mask=None,
    bias=dbias,
    sinks=dsinks,
  )
  return (gradients,)


def _organisation(spec: Spec, x: Operands):
  """The module whose loops suit the lengths."""
  T, S = x.q.shape[1], x.k.shape[1]
  q, limit = spec.blocks.q, spec.blocks.unroll
  short = max(T * q, min(q, T) * S) <= q * limit
  return unrolled if short else looped


blocked_attention.defvjp(_forward, _backward)
