"""Products with a plain matrix, in the forms that XLA is fast at on a CPU."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.common import target_platform


def einsum(eq: str, x: jax.Array, w: jax.Array) -> jax.Array:
  """Returns `jnp.einsum(eq, x, w)`.

  Args:
    eq: an einsum of two operands, e.g. `"...d,df->...f"`.
    x: rows.
    w: a matrix, in the dtype of `x`.
  """
  if eq.startswith("...") and _is_row(x):
    # Decided when the program is lowered: it may be compiled for another
    # platform than the one this process runs on.
    return jax.lax.platform_dependent(
      x, w, cpu=partial(_doubled, eq), default=partial(jnp.einsum, eq)
    )
  return _flatly(eq, x, w)


def _flatly(eq: str, x: jax.Array, w: jax.Array):
  """Returns `einsum(eq, x, w)` with the leading axes of `x` flattened to one.

  The gradient of `w` then sums over a single axis. For a sum over two axes,
  XLA's CPU backend transposes the inputs, which took longer than the product
  itself and twice as long as the whole backward pass of a layer.
  """
  rows = x.ndim + len("...") - eq.index(",")
  # A mesh may shard both batch and sequence; a flattened axis cannot express
  # that.
  if not eq.startswith("...") or rows < 2 or target_platform.may_be_sharded():
    return jnp.einsum(eq, x, w)
  y = jnp.einsum(eq, x.reshape(-1, *x.shape[rows:]), w)
  return y.reshape(*x.shape[:rows], *y.shape[1:])


def _is_row(x: jax.Array) -> bool:
  """Whether `x` is a single bf16 row, as in decoding with batch size 1."""
  return x.dtype == jnp.bfloat16 and x.ndim > 1 and x.size == x.shape[-1]


def _doubled(eq: str, x: jax.Array, w: jax.Array):
  """Returns `einsum(eq, x, w)`, computed for two copies of the row `x`.

  XLA's CPU backend has bf16 kernels for matrix-matrix products only and would
  convert the whole weight for a single row. Two rows are 16 times faster
  (SmolLM2's head: 2 instead of 32 ms).
  """
  # The leading axis belongs to the ellipsis, so it leads the output too.
  return jnp.einsum(eq, jnp.concatenate([x, x]), w)[:1]
