"""Grouped matmul: rows sorted by group times their group's matrix, in plain
lax.

On CPU, XLA's `ragged_dot` multiplies every row by every matrix and masks most
products to zero: E times the work. Here groups are padded to whole blocks of
rows, so that each block needs one matrix, and a loop runs over blocks. On two
cores that is 2.5 times (8 experts, 256 rows) to 10 times (32 experts, 2 rows)
as fast, and the gradient 2 to 28 times.
"""

import functools

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  """Returns `jax.lax.ragged_dot(x, w, sizes)`, in blocks on CPU.

  Args:
    x: `[M, I]`, rows sorted by group.
    w: `[E, I, O]`, in the dtype of `x`.
    sizes: integers `[E]`, rows of each group; rows past their sum give 0.
  """
  # Sums of sizes would wrap around in a narrow dtype, also in `ragged_dot`.
  sizes = sizes.astype(jnp.int32)
  if not len(x) or not len(w):
    return jax.lax.ragged_dot(x, w, sizes)
  return jax.lax.platform_dependent(
    x, w, sizes, cpu=blocked, default=jax.lax.ragged_dot
  )


def _rows_in_block(rows: int, groups: int) -> int:
  """Returns a power of two near the mean group, so that padding stays small."""
  return 1 << min(7, max(0, round(rows / max(groups, 1)).bit_length() - 1))


def _layout(rows, groups, sizes, block):
  """Returns (each row's index, each block's group, number of blocks).

  Rows without a group have an index past the end.
  """
  blocks = -(-rows // block) + min(groups, rows)
  ends = jnp.cumsum(sizes)
  padded = -(-sizes // block) * block
  padded_ends = jnp.cumsum(padded)
  index = jnp.arange(rows)
  group = jnp.minimum(jnp.searchsorted(ends, index, side="right"), groups - 1)
  shift = (padded_ends - padded) - (ends - sizes)
  places = jnp.where(index < ends[-1], index + shift[group], blocks * block)
  starts = jnp.arange(blocks) * block
  owners = jnp.searchsorted(padded_ends, starts, side="right")
  return places, jnp.minimum(owners, groups - 1), blocks


def _spread(x, places, blocks, block):
  """Scatters rows to their indices, `[blocks, block, I]`, zeros between."""
  zeros = jnp.zeros_like(x, shape=(blocks * block, x.shape[1]))
  return zeros.at[places].set(x, mode="drop").reshape(blocks, block, -1)


def _gathered(y, places):
  flat = y.reshape(-1, y.shape[-1])
  return flat.at[places].get(mode="fill", fill_value=0)


@jax.custom_vjp
def blocked(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  """Computes `matmul` by a loop over blocks of rows."""
  block = _rows_in_block(len(x), len(w))
  places, owners, blocks = _layout(len(x), len(w), sizes, block)

  def one(rows_and_owner):
    rows, owner = rows_and_owner
    return rows @ jax.lax.dynamic_index_in_dim(w, owner, keepdims=False)

  spread = _spread(x, places, blocks, block)
  return _gathered(jax.lax.map(one, (spread, owners)), places)


def _forward(x, w, sizes):
  return blocked(x, w, sizes), (x, w, sizes)


def _backward(saved, dy):
  x, w, sizes = saved
  block = _rows_in_block(len(x), len(w))
  places, owners, blocks = _layout(len(x), len(w), sizes, block)
  spread = functools.partial(_spread, places=places, blocks=blocks, block=block)

  def one(dw, rows_and_owner):
    rows, slopes, owner = rows_and_owner
    matrix = jax.lax.dynamic_index_in_dim(w, owner, keepdims=False)
    part = jnp.dot(rows.T, slopes, preferred_element_type=jnp.float32)
    return dw.at[owner].add(part), slopes @ matrix.T

  # A group's blocks are summed in float32, whatever the dtype of the products.
  zeros = jnp.zeros_like(dy, shape=w.shape, dtype=jnp.float32)
  dw, dx = jax.lax.scan(one, zeros, (spread(x), spread(dy), owners))
  return _gathered(dx, places), dw.astype(w.dtype), None


blocked.defvjp(_forward, _backward)
