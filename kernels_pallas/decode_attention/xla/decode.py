"""Decode attention in plain lax for every platform: the xla backend.

A loop over blocks of keys, for all entries at once: each entry's block is
gathered, multiplied and discarded, so that memory does not grow with the length
of rows. Steps after the longest entry do nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.common.target_platform import accumulator
from kernels_pallas.decode_attention.spec import capped
from kernels_pallas.decode_attention.work import Problem


def xla_decode(
  p: Problem,
) -> tuple[Float[Array, "E K M Hv"], Float[Array, "E K M"]]:
  """Returns the output and log-sum-exp of every entry, in accumulator dtype.

  Args:
    p: The problem.
  """
  items, K, M, _ = p.q.shape
  entries, Hv = items * p.splits, p.heads[2]
  dtype = accumulator(p.q.dtype)
  q = jnp.tile(p.q.astype(dtype), (p.splits, 1, 1, 1))
  work = p.work

  def step(state, n):
    def attend(state):
      return _attend(p, q, jnp.minimum(work.start + n, work.stop), state)

    return jax.lax.cond(n < longest, attend, lambda state: state, state), None

  # As many steps as the memory has blocks, the unused ones doing nothing, so
  # that the steps can be counted and differentiated.
  most = -(-p.capacity // (p.block * p.splits))
  longest = jnp.max(work.stop - work.start)

  def filled(value, *more):
    # Like q, so that it varies over a mesh as q does.
    return jnp.full_like(q, value, shape=(entries, K, M, *more))

  state = filled(-jnp.inf), filled(0), filled(0, Hv)
  (m, l, acc), _ = jax.lax.scan(step, state, jnp.arange(most))
  empty = l == 0
  l = jnp.where(empty, 1, l)
  return acc / l[..., None], jnp.where(empty, -jnp.inf, m + jnp.log(l))


def _attend(p, q, block, state):
  """One step of the online softmax (kernels_pallas/MATH.md 2), a block each."""
  m, l, acc = state
  first, k, v, k_scale, v_scale = _fetch(p, block)
  key = first[:, None] + jnp.arange(p.block)
  visible = _visible(p, key, block)
  s = jnp.einsum(
    "ekmh,ekch->ekmc", q, k.astype(q.dtype), precision=p.spec.precision
  )
  s = s * p.spec.scale
  s = s if k_scale is None else s * k_scale[:, :, None]
  s = jnp.where(visible[:, None], capped(p.spec, s), -jnp.inf)
  after = jnp.maximum(m, jnp.max(s, axis=-1))
  shift = jnp.where(after == -jnp.inf, 0, after)
  probabilities = jnp.exp(s - shift[..., None])
  factor = jnp.exp(m - shift)
  l = l * factor + jnp.sum(probabilities, axis=-1)
  seen = jnp.any(visible, axis=1)[:, None]
  # Invisible values may be NaN, and 0 * NaN is NaN.
  if v_scale is not None:
    probabilities = probabilities * jnp.where(seen, v_scale, 0)[:, :, None]
  v = jnp.where(seen[..., None], v.astype(q.dtype), 0)
  values = jnp.einsum(
    "ekmc,ekch->ekmh", probabilities, v, precision=p.spec.precision
  )
  return after, l, acc * factor[..., None] + values


def _visible(p: Problem, key, block):
  """Returns which queries see which keys, [E, M, block]."""
  work = p.work
  query = jnp.arange(p.q.shape[2]) // p.group
  position = work.position[:, None] + query
  live = query < work.count[:, None]
  # The last block is shifted back, over keys of the previous one.
  first = work.base + block * p.block
  fresh = (key >= first[:, None]) & (block < work.stop)[:, None]
  # The last page is repeated, whose keys a length beyond the memory would see.
  fresh &= key < work.high[:, None]
  seen = key[:, None] <= position[..., None]
  if p.spec.window is not None:
    seen &= key[:, None] > position[..., None] - p.spec.window
  return seen & live[..., None] & fresh[:, None]


def _fetch(p: Problem, block):
  """Returns first keys [E], keys and values [E, K, block, H], and scales."""
  first, row = p.work.base + block * p.block, p.work.row
  if p.table is None:
    first = jnp.minimum(first, p.capacity - p.block)
    take = jax.vmap(
      lambda r, at, x: jax.lax.dynamic_slice_in_dim(x[r], at, p.block, 1),
      (0, 0, None),
    )
    k, v = (take(row, first, x) for x in (p.storage.k, p.storage.v))
    return first, k, v, None, None
  last = jnp.maximum(p.work.high - 1, 0)
  page = (first[:, None] // p.unit) + jnp.arange(p.block // p.unit)
  # After an entry's last page, repeats it, so that no other page is read.
  page = jnp.minimum(page, (last // p.unit)[:, None])
  index = p.table[row[:, None], page]
  H, k_scale, v_scale = p.storage.head_dim, None, None
  kv = jnp.swapaxes(p.storage.kv[index], 1, 2)
  kv = kv.reshape(*kv.shape[:2], p.block, kv.shape[-1])
  if p.storage.scale is not None:
    scale = jnp.moveaxis(p.storage.scale[index], 1, 3)  # [E, 2, K, pages, size]
    scale = scale.reshape(*scale.shape[:3], p.block)
    k_scale, v_scale = scale[:, 0], scale[:, 1]
  return first, kv[..., :H], kv[..., H:], k_scale, v_scale
