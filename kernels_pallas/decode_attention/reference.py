"""Reference decode attention, from the definition, with all keys gathered."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.common.target_platform import accumulator
from kernels_pallas.decode_attention.spec import Spec, capped


def reference_decode(
  spec: Spec,
  q: Float[Array, "T N H"],
  k: Float[Array, "R S K H"],
  v: Float[Array, "R S K Hv"],
  row: Int[Array, " T"],
  position: Int[Array, " T"],
  live: Bool[Array, " T"],
) -> tuple[Float[Array, "T N Hv"], Float[Array, "T N"]]:
  """Softmax attention of each token over its row's keys.

  kernels_pallas/MATH.md 1 has the definition.

  Args:
    spec: Static part.
    q: Queries.
    k: Keys of whole rows, in the accumulator dtype.
    v: Values.
    row: The row whose keys a token sees.
    position: The token's position; it sees keys up to and including it.
    live: Whether the token belongs to a row.

  Returns:
    The output and the natural log-sum-exp in the accumulator dtype; 0 and
    -inf for tokens that see nothing.
  """
  T, N, H = q.shape
  S, K = k.shape[1:3]
  dtype = accumulator(q.dtype)
  q = q.astype(dtype).reshape(T, K, N // K, H)
  key = jnp.arange(S)
  visible = live[:, None] & (key <= position[:, None])
  if spec.window is not None:
    visible &= key > position[:, None] - spec.window
  # Invisible values may be NaN, and 0 * NaN is NaN.
  v = jnp.where(visible[:, :, None, None], v[row], 0)
  s = jnp.einsum("tkgh,tskh->tkgs", q, k[row], precision=spec.precision)
  s = capped(spec, s * spec.scale)
  s = jnp.where(visible[:, None, None], s, -jnp.inf)
  m = jnp.max(s, axis=-1, keepdims=True)
  m = jnp.where(m == -jnp.inf, 0, m)
  p = jnp.exp(s - m)
  l = jnp.sum(p, axis=-1, keepdims=True)
  empty = l == 0
  l = jnp.where(empty, 1, l)
  o = jnp.einsum("tkgs,tskh->tkgh", p / l, v, precision=spec.precision)
  lse = jnp.where(empty, -jnp.inf, m + jnp.log(l))[..., 0]
  return o.reshape(T, N, -1), lse.reshape(T, N)


def add_sinks(
  o: Float[Array, "T N Hv"],
  lse: Float[Array, "T N"],
  sinks: Float[Array, " N"],
) -> tuple[Float[Array, "T N Hv"], Float[Array, "T N"]]:
  """Adds one logit per head to the softmax, with value 0.

  Args:
    o: Output without sinks.
    lse: Its log-sum-exp.
    sinks: The logits.
  """
  total = jnp.logaddexp(lse, sinks.astype(lse.dtype))
  shift = jnp.where(total == -jnp.inf, 0, total)
  return o * jnp.exp(lse - shift)[..., None], total
