"""One tile of attention: logits, softmax state, merging states, gradients.

Heads are grouped, so that K and V are never repeated for their G query heads:
q [B, K, G, t, H], k [B, K, s, H], v [B, K, s, Hv], bias [B, K, G, t, s] (each
axis may be 1), sinks [K, G]. Matmuls run over the merged axes [B*K, G*t, .],
since CPUs are fast at one large batched product.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas.common.target_platform import accumulator
from kernels_pallas.flash_attention.spec import Operands, Spec
from kernels_pallas.masks import Tile, slice_axis


class SoftmaxState(NamedTuple):
  """Online softmax over some keys: [B, K, G, t, .] in the accumulator dtype.

  Fields: m the largest logit (-inf if no key was visible), l the sum of
  exp(s - m), acc the sum of exp(s - m) v after dropout; the last axis of m and
  l is 1.
  """

  m: Array
  l: Array
  acc: Array


class Logits(NamedTuple):
  """A tile's logits and what their gradient needs, in one layout.

  Fields: s, -inf where masked; slope, the derivative of the soft cap, or None;
  kept, Bool, whether dropout keeps the probability, or None.
  """

  s: Array
  slope: Array | None
  kept: Array | None


def group_heads(x: Operands) -> Operands:
  """Groups the heads of all arrays and sets padding queries and keys to 0.

  Padding may contain anything, even NaN, and 0 * NaN would reach the output.
  """
  N, K = x.q.shape[2], x.k.shape[2]
  sinks, bias = x.sinks, x.bias
  if bias is not None:
    heads = (K, N // K) if bias.shape[1] == N else (1, 1)
    bias = bias.reshape(bias.shape[0], *heads, *bias.shape[2:])
  keys = x.mask.valid_keys()

  def heads_first(y):
    # In this order a cache stored heads-first is never transposed.
    y = jnp.swapaxes(y, 1, 2)
    return y if keys is None else jnp.where(keys[:, None, :, None], y, 0)

  return x._replace(
    q=group_queries(zero_padding(x.q, x.mask.valid_queries()), K),
    k=heads_first(x.k),
    v=heads_first(x.v),
    bias=bias,
    sinks=None if sinks is None else sinks.reshape(K, N // K),
  )


def group_queries(
  x: Float[Array, "B T N H"], K: int
) -> Float[Array, "B K G T H"]:
  """Groups query heads by key head: head n belongs to key head n // G."""
  B, T, N, H = x.shape
  return x.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def ungroup_queries(
  x: Float[Array, "B K G T H"],
) -> Float[Array, "B T N H"]:
  """The inverse of `group_queries`."""
  B, K, G, T, H = x.shape
  return x.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def zero_padding(x: Array, live: Array | None) -> Array:
  """Sets `x` [B, T, N, H] to 0 where `live` [B or 1, T] is false."""
  return x if live is None else jnp.where(live[:, :, None, None], x, 0)


def logits(
  spec: Spec,
  x: Operands,
  products: Array,
  rows: Tile,
  keys: Tile,
  seen: Array | None,
  arrange: Callable[[Array], Array],
) -> Logits:
  """Computes the logits of query tile `rows` and key tile `keys`.

  Args:
    spec: Static part.
    x: Grouped arrays, possibly padded.
    products: q.k in the caller's layout.
    rows: (start, size) of the queries.
    keys: (start, size) of the keys.
    seen: Bool [b, 1, 1, t, s], or None if every key is visible.
    arrange: Transposes [B, K, G, t, s] to the layout of `products`.
  """
  t = products * spec.scale
  bias = None
  if x.bias is not None:
    bias = x.bias
    bias = bias if bias.shape[3] == 1 else slice_axis(bias, 3, *rows)
    bias = bias if bias.shape[4] == 1 else slice_axis(bias, 4, *keys)
    bias = arrange(bias).astype(t.dtype)
  if bias is not None and spec.bias_before_softcap:
    t = t + bias
    if seen is not None:
      t = jnp.where(arrange(seen), t, 0)  # the slope at NaN is NaN
  slope = None
  if spec.softcap is not None:
    tanh = jnp.tanh(t / spec.softcap)
    t, slope = spec.softcap * tanh, 1 - tanh**2
  if bias is not None and not spec.bias_before_softcap:
    t = t + bias
  if seen is not None:
    t = jnp.where(arrange(seen), t, -jnp.inf)
  kept = _kept(spec, x, rows, keys)
  return Logits(t, slope, None if kept is None else arrange(kept))


def visible(
  x: Operands, T: int, S: int, rows: Tile, keys: Tile
) -> Bool[Array, "b 1 1 t s"]:
  """Returns which keys of a tile are visible; T, S as in `Mask.visible`."""
  return x.mask.visible(T, S, rows, keys)[:, None, None]


def tile_attention(
  spec: Spec, x: Operands, rows: Tile, keys: Tile, seen: Array | None
) -> SoftmaxState:
  """Computes the softmax state of one tile; arguments as in `logits`."""
  q, k, v = _tile(x, rows, keys)
  shape = (*x.q.shape[:3], rows[1], -1)
  products = _dot(spec, "xth,xsh->xts", q, k).reshape(shape)
  s, _, kept = logits(spec, x, products, rows, keys, seen, arrange=lambda y: y)
  # Rounding is monotonic, so the largest product has the largest logit: scaling
  # the maximum instead of the products saves a pass through memory.
  plain = seen is None and x.bias is None and spec.softcap is None
  if plain and spec.scale > 0:
    m = jnp.max(products, axis=-1, keepdims=True) * spec.scale
  else:
    m = jnp.max(s, axis=-1, keepdims=True)
  # Of m the result is independent: gradient 0 (kernels_pallas/MATH.md 3).
  m = jax.lax.stop_gradient(m)
  p = jnp.exp(s - _finite(m))
  l = jnp.sum(p, axis=-1, keepdims=True)
  p = _drop(spec, p, kept).astype(v.dtype)
  acc = _dot(spec, "xts,xsh->xth", p.reshape(*q.shape[:2], -1), v)
  return SoftmaxState(m, l, acc.reshape(shape))


def merge(a: SoftmaxState, b: SoftmaxState) -> SoftmaxState:
  """Combines states of disjoint sets of keys (kernels_pallas/MATH.md 2.2)."""
  m = jnp.maximum(a.m, b.m)
  ours, theirs = jnp.exp(a.m - _finite(m)), jnp.exp(b.m - _finite(m))
  return SoftmaxState(
    m, a.l * ours + b.l * theirs, a.acc * ours + b.acc * theirs
  )


def finish(
  state: SoftmaxState, sinks: Float[Array, "K G"] | None
) -> tuple[Array, Array]:
  """Returns the output [B, K, G, t, Hv] and log-sum-exp [B, K, G, t]."""
  if sinks is not None:
    m = sinks.astype(state.m.dtype)[None, :, :, None, None]
    m = jnp.broadcast_to(m, state.m.shape)
    # A sink acts as a key whose value is 0; -inf disables it.
    most, nothing = jax.lax.stop_gradient(m), jnp.zeros_like(state.acc)
    state = merge(
      state, SoftmaxState(most, jnp.exp(m - _finite(most)), nothing)
    )
  empty = state.l == 0
  l = jnp.where(empty, 1, state.l)
  lse = jnp.where(empty, -jnp.inf, _finite(state.m) + jnp.log(l))
  return state.acc / l, lse[..., 0]


def initial_state(x: Operands, rows: int) -> SoftmaxState:
  """Returns the state of `rows` queries before the first key."""
  shape = (*x.q.shape[:3], rows)
  return SoftmaxState(
    full_like_queries(x, (*shape, 1), -jnp.inf),
    full_like_queries(x, (*shape, 1)),
    full_like_queries(x, (*shape, x.v.shape[-1])),
  )


def full_like_queries(
  x: Operands, shape: tuple[int, ...], value: float = 0
) -> Array:
  """Returns an array to accumulate tiles in, in the accumulator dtype.

  Under `jax.shard_map` it varies over the same mesh axes as the queries, as the
  tiles do: a loop's carry must not change its type.
  """
  dtype = accumulator(x.q.dtype)
  return jnp.full_like(x.q, value, dtype=dtype, shape=shape)


def add_tile(total: Array, part: Array, *places: tuple[int, Tile]) -> Array:
  """Adds `part` to `total` at the given (axis, tile) positions.

  Axes in which `total` has size 1 were broadcast: `part` is summed over them.
  """
  spread = [a for a in range(total.ndim) if total.shape[a] == 1]
  part = jnp.sum(part, axis=spread, keepdims=True)
  here, starts = total, [0] * total.ndim
  for axis, (start, size) in places:
    if total.shape[axis] > 1:
      here, starts[axis] = slice_axis(here, axis, start, size), start
  starts = [jnp.asarray(start, jnp.int32) for start in starts]
  return jax.lax.dynamic_update_slice(total, here + part, starts)


class TileCotangents(NamedTuple):
  """Backward inputs of a query tile, grouped: do [B, K, G, t, Hv], rest [., t].

  `lse` is the saved log-sum-exp with +inf where no key was visible, `shift` is
  sum(do * o) minus the cotangent of the log-sum-exp.
  """

  do: Array
  lse: Array
  shift: Array


def tile_gradients(
  spec: Spec,
  x: Operands,
  rows: Tile,
  keys: Tile,
  seen: Array | None,
  cotangents: TileCotangents,
) -> tuple[Array, Array, Array, Array]:
  """Computes a tile's share of dq, dk, dv, dbias (kernels_pallas/MATH.md 3).

  Scores are transposed here, [s, t]: then only the matmul for dq contracts over
  an axis of k other than the last. For that XLA would copy dt, or convert it to
  float32, so k is transposed first.

  Args:
    spec: Static part.
    x: Grouped arrays.
    rows: (start, size) of the queries.
    keys: (start, size) of the keys.
    seen: As in `logits`.
    cotangents: Backward inputs of the queries in `rows`.

  Returns:
    dq [B, K, H, G, t], dk [B, K, s, H], dv [B, K, s, Hv] and dbias
    [B, K, G, t, s] in the accumulator dtype.
  """
  (B, K, G, _, _), t, s = x.q.shape, rows[1], keys[1]
  q, k, v = _tile(x, rows, keys)
  do = cotangents.do.astype(q.dtype).reshape(B * K, G * t, -1)

  def keys_first(y):
    return jnp.moveaxis(y, 4, 2)

  def matrices(y):
    return y.astype(q.dtype).reshape(B * K, s, G * t)

  tile = (B, K, s, G, t)
  products = _dot(spec, "xsh,xth->xst", k, q).reshape(tile)
  u, slope, kept = logits(
    spec, x, products, rows, keys, seen, arrange=keys_first
  )
  p = jnp.exp(u - cotangents.lse[:, :, None])
  dv = _dot(spec, "xst,xth->xsh", matrices(_drop(spec, p, kept)), do)
  dp = _dot(spec, "xsh,xth->xst", v, do).reshape(tile)
  du = p * (_drop(spec, dp, kept) - cotangents.shift[:, :, None])
  dt = du if slope is None else du * slope
  dbias = jnp.moveaxis(dt if spec.bias_before_softcap else du, 2, 4)
  dt = matrices(dt)
  k = jax.lax.optimization_barrier(jnp.swapaxes(k, 1, 2))
  dq = _dot(spec, "xhs,xst->xht", k, dt).reshape(B, K, -1, G, t)
  dk = _dot(spec, "xst,xth->xsh", dt, q).reshape(B, K, s, -1)
  return dq * spec.scale, dk * spec.scale, dv.reshape(B, K, s, -1), dbias


def _tile(x: Operands, rows: Tile, keys: Tile) -> tuple[Array, Array, Array]:
  """Slices q, k, v of a tile as batched matrices, [B*K, G*t or s, .]."""
  parts = (
    slice_axis(x.q, 3, *rows),
    slice_axis(x.k, 2, *keys),
    slice_axis(x.v, 2, *keys),
  )
  batch = x.q.shape[0] * x.q.shape[1]
  return tuple(y.reshape(batch, -1, y.shape[-1]) for y in parts)


def _dot(spec: Spec, equation: str, a: Array, b: Array) -> Array:
  """A batched matmul with sums in the accumulator dtype."""
  return jnp.einsum(
    equation,
    a,
    b,
    precision=spec.precision,
    preferred_element_type=accumulator(a.dtype),
  )


def _finite(m: Array) -> Array:
  """Replaces -inf by 0, so that a difference from it is never NaN."""
  return jnp.where(m == -jnp.inf, 0, m)


def _drop(spec: Spec, p: Array, kept: Array | None) -> Array:
  return p if kept is None else jnp.where(kept, p / (1 - spec.dropout_rate), 0)


def _kept(spec: Spec, x: Operands, rows: Tile, keys: Tile) -> Array | None:
  if not spec.dropout_rate:
    return None
  B, K, G = x.q.shape[:3]
  h = jnp.arange(K * G).reshape(1, K, G, 1, 1)
  b, i, j = jnp.arange(B), jnp.arange(rows[1]), jnp.arange(keys[1])
  b, i = b.reshape(-1, 1, 1, 1, 1), (rows[0] + i)[:, None]
  return spec.keep(x.seed, spec.dropout_rate, b, h, i, keys[0] + j)
