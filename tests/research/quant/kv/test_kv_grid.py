"""Tests KV grids against KIVI's numbers and those of pages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode_attention import pages
from research.quant.kv.kv_grid import Grid
from research.quant.layouts import packing
from research.typing import UserError
from tests.research.quant import kivi

DIM = 16
X = np.random.default_rng(0).standard_normal((24, DIM)).astype(np.float32)
X[:, 3] *= 40  # a channel as keys have them


@functools.partial(jax.jit, static_argnums=0)
def _both(grid, x):
  packed = grid.encode(x)
  return packed, grid.decode(packed)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("along", ["channel", "token"])
def test_numbers_are_kivis(along, bits):
  packed, got = _both(Grid(bits, along == "channel", 8), X)
  reference = kivi.per_channel if along == "channel" else kivi.per_token
  want = reference(X, bits, 8)
  # The last product and sum may be one rounding or two.
  np.testing.assert_allclose(got, want, rtol=2**-22, atol=2**-23 * 100)
  # Half a step, the float16's rounding of the least number, and that of the
  # scale under the largest code.
  groups = X.reshape(3, 8, DIM) if along == "channel" else X.reshape(24, 2, 8)
  axis = 1 if along == "channel" else 2
  span = np.ptp(groups, axis).max()
  worst = span / (2**bits - 1) / 2 + 2**-11 * (abs(X).max() + span)
  assert abs(got - X).max() <= worst
  assert packed.codes.dtype == jnp.uint8
  assert packed.codes.size == X.size * bits // 8


@pytest.mark.parametrize("along", ["channel", "token"])
@pytest.mark.parametrize("bits", [2, 4, 8, "int8", "fp8", 16])
def test_bits_are_those_of_the_arrays(along, bits):
  grid = Grid(bits, along == "channel", 8)
  packed, _ = _both(grid, X)
  taken = 8 * sum(x.nbytes for x in jax.tree.leaves(packed)) / X.size
  assert taken == (32 if bits == 16 else grid.bits_per_number(DIM))
  room = grid.empty((), 24, DIM, jnp.float32)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), room) == jax.tree.map(
    lambda x: (x.shape, x.dtype), packed
  )
  assert grid.tokens(packed) == 24


@pytest.mark.parametrize("along", ["channel", "token"])
@pytest.mark.parametrize("bits", [2, 8, "int8", "fp8"])
@pytest.mark.parametrize("value", [0.0, -3.0, 1e-30, 6e4])
def test_equal_numbers_are_no_division_by_zero(along, bits, value):
  _, got = _both(Grid(bits, along == "channel", 8), np.full_like(X, value))
  # 6e4 has 11 bits in float16; in units of the largest number it is exact.
  np.testing.assert_allclose(got, value, rtol=2**-11, atol=1e-29)


def test_ranges_beyond_float16_stay_finite():
  x = X.copy()
  x[0, 0], x[5, 5] = 1e6, -1e6
  for along in (True, False):
    _, got = _both(Grid(4, along, 8), x)
    assert np.isfinite(got).all()


@pytest.mark.parametrize(
  "bits, dtype", [("int8", "int8"), ("fp8", "float8_e4m3fn")]
)
def test_single_tokens_are_those_of_pages(bits, dtype):
  packed, got = _both(Grid(bits), X)
  codes, scale = pages.quantize(jnp.asarray(X), jnp.dtype(dtype))
  np.testing.assert_array_equal(
    np.asarray(packed.codes).view(np.uint8), np.asarray(codes).view(np.uint8)
  )
  np.testing.assert_array_equal(packed.scale[..., 0], scale)
  np.testing.assert_array_equal(got, codes.astype(jnp.float32) * scale[:, None])


def test_a_rotation_shares_a_large_channel():
  """One channel of 40 sets the steps of its group; rotated, of none so much."""
  errors = [
    float(jnp.linalg.norm(_both(Grid(4, False, 16, rotated), X)[1] - X))
    for rotated in (False, True)
  ]
  assert errors[1] < 0.8 * errors[0]
  _, fine = _both(Grid(8, False, 16, True), X)
  assert abs(fine - X).max() < 0.02 * abs(X).max()


def test_codes_are_packed_in_planes():
  packed, _ = _both(Grid(4, True, 8), X)
  codes = packing.unpack(np.asarray(packed.codes), 4)
  low = np.asarray(packed.low, np.float32)[:, None]
  scale = np.asarray(packed.scale, np.float32)[:, None]
  want = np.clip(np.round((X.reshape(3, 8, DIM) - low) / scale), 0, 15)
  np.testing.assert_array_equal(codes, want)


def test_groups_that_do_not_divide_heads_are_refused():
  with pytest.raises(UserError, match="32 channels.*80: take one of 16"):
    Grid(4, False, 32).check(80, "kv values")
  with pytest.raises(UserError, match="kv keys: a group.*multiple of 4"):
    Grid(2, True, 6).check(80, "kv keys")
  Grid("int8").check(80, "kv values")
