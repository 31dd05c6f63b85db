"""Reference attention, straight from the definition: O(T S) memory, no tiles.

The oracle for the other backends, with every feature; float64 inputs are
computed in float64. JAX differentiates it, so it also checks their backward
formulas.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.common.target_platform import accumulator
from kernels_pallas.flash_attention.spec import Operands, Spec


def reference_attention(
  spec: Spec, x: Operands
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """Softmax attention (kernels_pallas/MATH.md 1) with all scores materialised.

  Args:
    spec: Static part.
    x: Arrays.

  Returns:
    The output in the dtype of q and the natural log-sum-exp of the logits
    (sinks included, before dropout); 0 and -inf where a query sees no key and
    there is no sink.
  """
  (B, T, N, _), S, K = x.q.shape, x.k.shape[1], x.k.shape[2]
  dtype = accumulator(x.q.dtype)
  k = jnp.repeat(x.k, N // K, axis=2).astype(dtype)
  v = jnp.repeat(x.v, N // K, axis=2).astype(dtype)
  keys, queries = x.mask.valid_keys(), x.mask.valid_queries()
  if keys is not None:
    k = jnp.where(keys[:, :, None, None], k, 0)
    v = jnp.where(keys[:, :, None, None], v, 0)
  q = x.q.astype(dtype)
  if queries is not None:
    q = jnp.where(queries[:, :, None, None], q, 0)

  bias = 0 if x.bias is None else x.bias.astype(dtype)
  t = jnp.einsum("btnh,bsnh->bnts", q, k, precision=spec.precision) * spec.scale
  t = t + bias if spec.bias_before_softcap else t
  # The inner wheres keep NaN and inf of masked scores out of gradients.
  visible = x.mask.visible(T, S)[:, None]
  t = jnp.where(visible, t, 0)
  u = t if spec.softcap is None else spec.softcap * jnp.tanh(t / spec.softcap)
  u = u if spec.bias_before_softcap else u + bias
  s = jnp.where(visible, jnp.where(visible, u, 0), -jnp.inf)

  m = jnp.max(s, axis=-1, keepdims=True, initial=-jnp.inf)
  if x.sinks is not None:
    sinks = x.sinks.astype(dtype)[None, :, None, None]
    m = jnp.maximum(m, sinks)
  m = jax.lax.stop_gradient(jnp.where(m == -jnp.inf, 0, m))
  p = jnp.exp(s - m)
  l = jnp.sum(p, axis=-1, keepdims=True)
  l = l if x.sinks is None else l + jnp.exp(sinks - m)
  empty = l == 0
  p = p / jnp.where(empty, 1, l)
  lse = jnp.where(empty, -jnp.inf, m + jnp.log(jnp.where(empty, 1, l)))
  if spec.dropout_rate:
    kept = spec.keep(
      x.seed,
      spec.dropout_rate,
      *jnp.ogrid[:B, :N, :T, :S],
    )
    p = jnp.where(kept, p / (1 - spec.dropout_rate), 0)
  o = jnp.einsum("bnts,bsnh->btnh", p, v, precision=spec.precision)
  return o.astype(spec.output or x.q.dtype), lse[..., 0]
