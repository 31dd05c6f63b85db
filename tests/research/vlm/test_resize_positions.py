"""Learned positions of another grid: big_vision's and transformers'."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from research.typing import UserError
from research.vlm.encoders import bicubic, corner_aligned, resized_positions

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "positions.npz"


def table(rows, columns, width=3):
  rng = np.random.default_rng(rows * 100 + columns)
  return jnp.asarray(rng.normal(size=(rows * columns, width)), jnp.float32)


@pytest.mark.parametrize(
  "old, new",
  [
    ((4, 4), (7, 7)),
    ((5, 3), (2, 9)),
    ((1, 4), (3, 2)),
    ((6, 6), (4, 5)),
    ((3, 3), (1, 1)),
  ],
)
def test_corner_aligned_is_big_visions(old, new):
  """Which calls `scipy.ndimage.zoom(order=1)` on the grid."""
  before = table(*old)
  found = resized_positions(before, old, new)
  grid = np.asarray(before, np.float64).reshape(*old, -1)
  zoom = (new[0] / old[0], new[1] / old[1], 1)
  expected = ndimage.zoom(grid, zoom, order=1)
  np.testing.assert_allclose(
    found, expected.reshape(found.shape), rtol=1e-6, atol=3e-6
  )


@pytest.mark.parametrize("grid", ["6x6", "7x3", "2x9", "3x3", "1x5"])
def test_bicubic_is_transformers(grid):
  with np.load(GOLDEN) as file:
    before, expected = file["table"], file[grid]
  found = resized_positions(
    jnp.asarray(before),
    (4, 4),
    tuple(map(int, grid.split("x"))),
    interpolation=bicubic,
    class_token=True,
  )
  # Two sums of four numbers up to 3 in fp32.
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=3e-6)
  np.testing.assert_array_equal(found[0], before[0])


@pytest.mark.parametrize("method", [bicubic, corner_aligned])
def test_the_same_grid_is_the_same_table(method):
  for old in (1, 2, 5):
    np.testing.assert_allclose(method(old, old), np.eye(old), atol=1e-15)
  before = table(3, 2).astype(jnp.bfloat16)
  after = resized_positions(before, (3, 2), (6, 2), interpolation=method)
  assert after.dtype == jnp.bfloat16 and after.shape == (12, 3)


def test_a_table_of_another_grid_is_refused():
  with pytest.raises(UserError, match="6 positions, expected 7 for a grid"):
    resized_positions(table(3, 2), (3, 2), (4, 4), class_token=True)
