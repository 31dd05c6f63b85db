"""8-bit Adam: the map, the codes and the steps of bitsandbytes on the CPU."""

import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import tree
from research.optim import adam8bit
from research.training import state

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "optimizers.json"
SIZE = 600


@functools.cache
def golden():
  return json.loads(GOLDEN.read_text())["eight_bits"]


@pytest.mark.parametrize("name", ["signed", "unsigned"])
def test_maps_are_bitwise_those_of_bitsandbytes(name):
  found = adam8bit.dynamic_map(name == "signed")
  np.testing.assert_array_equal(found, np.float32(golden()[name]))


def sines():
  t = np.arange(SIZE)
  return np.float32(0.5 * np.sin(0.7 * t)) ** 3


def test_codes_are_the_nearest_and_those_of_bitsandbytes():
  x, values = sines(), adam8bit.dynamic_map(True)
  codes, top = adam8bit.encode(jnp.asarray(x), values)
  np.testing.assert_array_equal(top, np.float32(golden()["absmax"]))
  unit = x / np.repeat(top, 256)[:SIZE]
  distance = np.abs(unit[:, None] - values)
  found = np.take_along_axis(distance, np.asarray(codes)[:, None], 1)[:, 0]
  np.testing.assert_allclose(found, distance.min(1), atol=1e-7)
  # bitsandbytes' search on the CPU is off by a few codes very close to 0, and
  # gives 131 for 0 itself, which is 127.
  far = np.abs(unit) > 1e-4
  assert far.mean() > 0.95
  np.testing.assert_array_equal(
    np.asarray(codes)[far], np.asarray(golden()["codes"])[far]
  )


def test_six_steps_are_those_of_bitsandbytes():
  t = np.arange(SIZE)
  params = {"w": jnp.float32(0.5 * np.sin(0.7 * t + 1))}
  tx = adam8bit.adamw8bit(0.01, weight_decay=0.1, clip=None, least=0)
  held, update = tx.init(params), jax.jit(tx.update)
  for k in range(1, 7):
    g = {"w": jnp.float32(np.sin(0.3 * t**2 + 1.3 + 2.1 * k))}
    updates, held = update(g, held, params)
    params = optax.apply_updates(params, updates)
  want = golden()
  packed = held[1].inner_states["packed"].inner_state
  same = [
    (np.asarray(packed.mean["w"]) == want["m"]).mean(),
    (np.asarray(packed.square["w"]) == want["v"]).mean(),
  ]
  # Roundings of 1e-7 decide between two codes for 1 number in 1e4 or fewer;
  # a code is 1/128 of a decade's mantissa.
  assert min(same) > 0.99
  tops = packed.mean_top["w"], packed.square_top["w"]
  chex.assert_trees_all_close(
    tops, tuple(map(np.float32, want["tops"])), rtol=1e-5
  )
  close = np.isclose(params["w"], np.float32(want["p"]), atol=1e-6)
  assert close.mean() > 0.99
  np.testing.assert_allclose(params["w"], want["p"], atol=2e-3)


@pytest.mark.parametrize("shape", [(3, 4, 512), (3, 5, 7, 11), (600,), (2,)])
@pytest.mark.sample(3)
def test_blocks_keep_the_order_of_elements(shape):
  rng = np.random.default_rng(0)
  x = jnp.float32(rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 3, shape))
  values = adam8bit.dynamic_map(True)
  codes, top = adam8bit.encode(x, values)
  flat, flat_top = adam8bit.encode(x.reshape(-1), values)
  assert codes.shape == shape and codes.dtype == jnp.uint8
  np.testing.assert_array_equal(codes.reshape(-1), flat)
  np.testing.assert_array_equal(top.reshape(-1), flat_top)
  back = adam8bit.decode(codes, top, values)
  block = np.resize(np.repeat(np.asarray(flat_top), 256), x.size).reshape(shape)
  # Half of the widest gap, 0.9 / 64 of a block's top, and float32's rounding.
  assert (np.abs(back - x) <= (0.5 * 0.9 / 64 + 1e-6) * block).all()


def test_zeros_stay_zero():
  codes, top = adam8bit.encode(jnp.zeros(300), adam8bit.dynamic_map(False))
  assert not adam8bit.decode(codes, top, adam8bit.dynamic_map(False)).any()
  assert not top.any() and not codes.any()


def test_bytes_and_who_is_packed():
  params = {
    "embed": jnp.zeros((64, 256)),
    "run0": {
      "mlp": {"up": jnp.zeros((2, 64, 512))},
      "scale": jnp.zeros((2, 64)),
    },
  }
  made = state.create(params, ".", adam8bit.adamw8bit(1e-3))
  packed, whole = 2 * 64 * 512, 64 * 256 + 2 * 64
  counters = 4  # Adam's two, and the rate and its own
  assert tree.nbytes(made.opt_state) == (
    2 * packed + 2 * 4 * packed // 256 + 2 * 4 * whole + 4 * counters
  )
  for path, x in tree.flatten_paths(made.opt_state):
    assert x.ndim == 0 or path.endswith(("embed", "mlp/up", "scale")), path
