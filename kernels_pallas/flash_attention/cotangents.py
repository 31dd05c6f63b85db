"""Per-query inputs of the backward passes, and gradients that need no tiles.

Given the output and the log-sum-exp over all keys, the gradient with respect to
any subset of the keys needs no other keys: P = exp(s - lse)
(kernels_pallas/MATH.md 3). So a backend's `gradients` serves a whole sequence
and a step of ring attention alike.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from kernels_pallas.common.target_platform import accumulator
from kernels_pallas.flash_attention import tiles
from kernels_pallas.flash_attention.spec import Operands


class QueryCotangents(NamedTuple):
  """Per-query inputs of the backward pass.

  Fields: do [B, T, N, Hv], 0 for padding; lse [B, N, T], +inf where no key is
  visible, so that P = exp(s - inf) = 0 and all gradients are 0; shift [B, N,
  T], sum(do * o) minus the cotangent of the log-sum-exp.
  """

  do: Array
  lse: Array
  shift: Array


def save_residuals(
  x: Operands, o: Float[Array, "B T N Hv"], lse: Float[Array, "B N T"]
) -> tuple[tuple[Array, Array], tuple[Operands, Array, Array]]:
  """Returns a forward rule's results and its residuals for `query_cotangents`.

  The names let a `jax.checkpoint` policy save them instead of recomputing
  attention.
  """
  o = checkpoint_name(o, "attn_out")
  lse = checkpoint_name(lse, "attn_lse")
  return (o, lse), (x, o, lse)


def query_cotangents(
  x: Operands,
  o: Float[Array, "B T N Hv"],
  lse: Float[Array, "B N T"],
  do: Float[Array, "B T N Hv"],
  dlse: Float[Array, "B N T"],
) -> QueryCotangents:
  """Computes the per-query inputs of the backward pass.

  Args:
    x: Arrays of the call.
    o: Its output.
    lse: Its log-sum-exp, sinks included.
    do: Cotangent of o.
    dlse: Cotangent of lse.
  """
  dtype = accumulator(x.q.dtype)
  do = tiles.zero_padding(do, x.mask.valid_queries())
  delta = jnp.sum(do.astype(dtype) * o.astype(dtype), axis=-1)
  empty = lse == -jnp.inf
  shift = delta.swapaxes(1, 2) - jnp.where(empty, 0, dlse)
  return QueryCotangents(do, jnp.where(empty, jnp.inf, lse), shift)


def cast_gradients(
  x: Operands, found: Operands, rows: QueryCotangents
) -> Operands:
  """Casts a call's gradients to its arrays' dtypes and adds that of the sinks.

  Args:
    x: Arrays of the call.
    found: Gradients of q, k, v and bias, in the accumulator dtype.
    rows: The call's per-query inputs.
  """
  dsinks, dbias = None, found.bias
  if x.sinks is not None:
    sinks = x.sinks.astype(rows.lse.dtype)[None, :, None]
    share = jnp.exp(sinks - rows.lse)
    dsinks = -jnp.sum(share * rows.shift, axis=(0, 2)).astype(x.sinks.dtype)
  if dbias is not None:
    dbias = dbias.reshape(x.bias.shape).astype(x.bias.dtype)
  return Operands(
    q=found.q.astype(x.q.dtype),
    k=found.k.astype(x.k.dtype),
    v=found.v.astype(x.v.dtype),
    mask=None,
    bias=dbias,
    sinks=dsinks,
  )
