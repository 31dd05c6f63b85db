"""What every backward pass needs of each query, and what follows from it alone.

From the output and the log-sum-exp of all keys follows the gradient with
respect to any part of the keys (kernels.md 2.2): P = exp(s - lse) needs no
other part. So a backend's `gradients` serves a whole sequence and one step of
ring attention alike.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from kernels_pallas.common.target_platform import accumulator
from kernels_pallas.flash_attention import tiles
from kernels_pallas.flash_attention.spec import Operands


class Queries(NamedTuple):
  """Fields: do [B, T, N, Hv], 0 for padding; lse and shift [B, N, T].

  `lse` is +inf where no key is visible: P = exp(s - inf) = 0, and so are all
  gradients. `shift` is sum(do * o) minus the cotangent of the log-sum-exp.
  """

  do: Array
  lse: Array
  shift: Array


def kept(
  x: Operands, o: Float[Array, "B T N Hv"], lse: Float[Array, "B N T"]
) -> tuple[tuple[Array, Array], tuple[Operands, Array, Array]]:
  """Returns a forward rule's results, and what it keeps for `queries`.

  The names are what `jax.checkpoint` may keep instead of attending again.
  """
  o = checkpoint_name(o, "attn_out")
  lse = checkpoint_name(lse, "attn_lse")
  return (o, lse), (x, o, lse)


def queries(
  x: Operands,
  o: Float[Array, "B T N Hv"],
  lse: Float[Array, "B N T"],
  do: Float[Array, "B T N Hv"],
  dlse: Float[Array, "B N T"],
) -> Queries:
  """Returns what the backward pass needs.

  Args:
    x: Arrays of the call.
    o: Its output.
    lse: Its log-sum-exp, sinks included.
    do: Cotangent of o.
    dlse: Cotangent of lse.
  """
  dtype = accumulator(x.q.dtype)
  do = tiles.zero_padding(do, x.mask.live_queries())
  delta = jnp.sum(do.astype(dtype) * o.astype(dtype), axis=-1)
  empty = lse == -jnp.inf
  shift = delta.swapaxes(1, 2) - jnp.where(empty, 0, dlse)
  return Queries(do, jnp.where(empty, jnp.inf, lse), shift)


def finished(x: Operands, found: Operands, rows: Queries) -> Operands:
  """Returns a call's gradients in the types of its arrays, sinks' included.

  Args:
    x: Arrays of the call.
    found: Gradients of q, k, v and bias, in the accumulator dtype.
    rows: Of the call.
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
