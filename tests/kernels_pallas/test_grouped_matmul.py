"""The blocked grouped matmul equals XLA's, whatever the groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import grouped_matmul

CASES = {  # rows, sizes
  "even": (24, [6, 6, 6, 6]),
  "some empty": (23, [0, 9, 0, 14, 0]),
  "one has all": (17, [0, 0, 17]),
  "rows of no group": (20, [3, 0, 8]),
  "all empty": (5, [0, 0]),
  "fewer rows than groups": (2, [0, 0, 1, 0, 0, 0, 1, 0, 0]),
  "one group": (9, [9]),
  "many rows": (700, [130, 1, 255, 300, 14]),
}


def arrays(rows, sizes, dtype=np.float32):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((rows, 12)).astype(dtype)
  w = rng.standard_normal((len(sizes), 12, 7)).astype(dtype)
  seen = rng.standard_normal((rows, 7)).astype(dtype)
  return tuple(map(jnp.asarray, (x, w, np.array(sizes, np.int32), seen)))


def by_hand(x, w, sizes, seen):
  """Returns y, dx and dw of `sum(y * seen)`, group by group in fp64."""
  x, w, seen = (np.asarray(a, np.float64) for a in (x, w, seen))
  y, dx, dw, start = np.zeros_like(seen), np.zeros_like(x), np.zeros_like(w), 0
  for e, size in enumerate(np.asarray(sizes)):
    rows = slice(start, start + size)
    y[rows], dx[rows] = x[rows] @ w[e], seen[rows] @ w[e].T
    dw[e] = x[rows].T @ seen[rows]
    start += size
  return y, dx, dw


@pytest.mark.parametrize("f", [grouped_matmul.blocked, grouped_matmul.matmul])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.cover(1)
def test_values_and_gradients(case, f):
  x, w, sizes, seen = arrays(*CASES[case])

  @jax.jit
  def all_of(x, w):
    y, pull = jax.vjp(lambda x, w: f(x, w, sizes), x, w)
    return y, *pull(seen)

  for got, want in zip(all_of(x, w), by_hand(x, w, sizes, seen), strict=True):
    # Up to 300 products of normal numbers in fp32.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_sizes_of_any_integers(dtype):
  """Each fits the dtype; their sum of 290 does not fit 8 bits."""
  x, w, sizes, seen = arrays(300, [100, 90, 100])
  want = by_hand(x, w, sizes, seen)
  narrow = sizes.astype(dtype)
  y, pull = jax.vjp(lambda x, w: grouped_matmul.matmul(x, w, narrow), x, w)
  for got, expected in zip((y, *pull(seen)), want, strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", [(0, [0, 0]), (5, []), (0, [])])
def test_no_rows_or_no_groups(case):
  x, w, sizes, seen = arrays(*case)
  y, pull = jax.vjp(lambda x, w: grouped_matmul.matmul(x, w, sizes), x, w)
  for got, want in zip(
    (y, *pull(seen)), by_hand(x, w, sizes, seen), strict=True
  ):
    np.testing.assert_array_equal(got, want)


def test_the_gradient_of_a_group_of_many_blocks_adds_up_in_fp32():
  rows = 4096
  x = jnp.ones((rows, 1), jnp.bfloat16)
  w = jnp.ones((1, 1, 1), jnp.bfloat16)
  sizes = jnp.asarray([rows])

  def total(w):
    return grouped_matmul.blocked(x, w, sizes).astype(jnp.float32).sum()

  # Block by block in bf16 the sum would stop growing at 256 times a block.
  assert float(jax.grad(total)(w)[0, 0, 0]) == rows


def test_layers_may_be_scanned_and_checkpointed():
  x, w, sizes, _ = arrays(24, [6, 6, 6, 6])
  square = jnp.stack([w[:, :, :1] @ w[:, :1].mean(-1, keepdims=True)] * 3)
  square = jnp.broadcast_to(square, (3, 4, 12, 1))
  layers = jnp.tile(square, (1, 1, 1, 12)) / 12

  def loss(layers, f):
    def body(x, w):
      return jnp.tanh(f(x, w, sizes)), None

    return (jax.lax.scan(jax.checkpoint(body), x, layers)[0] ** 2).sum()

  got, want = (
    jax.jit(jax.grad(lambda w, f=f: loss(w, f)))(layers)
    for f in (grouped_matmul.matmul, jax.lax.ragged_dot)
  )
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
