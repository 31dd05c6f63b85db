"""Q-GaLore's parts against its authors' code, and a step of it in NumPy."""

import dataclasses
import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import tree, weights
from research.optim.low_rank import int8_weights, layerwise, projectors
from research.optim.low_rank.subspace import Projection
from research.training import state, step
from research.typing import UserError

GOLDEN = pathlib.Path(__file__).parents[3] / "golden" / "qgalore.json"


@functools.cache
def golden():
  return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("kind", range(3))
def test_gaps_are_the_authors(kind):
  steps = golden()["matrices"][kind]["steps"]
  pace = projectors.Lazy(last=2)
  # Two of a stack, of which one never sees the same direction again.
  size = len(steps[0]["first"])
  held = pace.init((2,), 1, size)
  for k, want in enumerate(steps):
    due = pace.due(held, jnp.int32(k))
    assert bool(due[0]) == want["due"]
    other = np.eye(size)[k % size]
    first = jnp.float32([want["first"], other])
    held = pace.after(held, due, first)
    assert int(held["gap"][0]) == want["gap"]
    assert int(held["gap"][1]) == 1


@pytest.mark.parametrize("kind", range(3))
def test_four_bits_are_the_authors(kind):
  want = golden()["matrices"][kind]
  storage = projectors.Int4(group=16)
  # Theirs is [out, in], ours its transpose; so are projectors.
  p = jnp.float32(want["projector"]).T
  found = storage.encode(p)
  np.testing.assert_array_equal(found["codes"], want["codes"])
  held = storage.pack(found)
  assert held["codes"].nbytes == p.size // 2
  chex.assert_trees_all_equal(storage.unpack(held), found)
  np.testing.assert_allclose(
    storage.decode(found, p.shape), np.transpose(want["quantized"]), rtol=1e-6
  )


def test_eight_bits_are_the_authors():
  want = golden()["weight"]
  w = jnp.float32(want["w"]).T
  found = int8_weights.encode(w, 16)
  np.testing.assert_array_equal(found.codes, want["codes"])
  np.testing.assert_array_equal(found.zero, want["zeros"])
  np.testing.assert_allclose(found.step, want["scales"], rtol=1e-6)
  # A code of -0.5 may have been rounded after another last bit.
  np.testing.assert_allclose(found.dense(), np.transpose(want["left"]), 1e-5)


@pytest.mark.parametrize("top", [15, 255])
@pytest.mark.parametrize("ends", [(5, 6), (-6, -5), (0, 1), (-1, 2), (3, 3)])
def test_numbers_of_one_sign_are_numbers(ends, top):
  x = jnp.linspace(*ends, 8)[None]
  step, zero = projectors.steps(x, top)
  codes = jnp.clip(jnp.round(x / step) + zero, 0, top)
  np.testing.assert_allclose(step * (codes - zero), x, atol=float(step[0, 0]))
  assert float(step[0, 0]) <= max(map(abs, (*ends, 3))) / top + 1e-6


def test_codes_by_chance_are_right_in_the_mean():
  rng = np.random.default_rng(0)
  w = jnp.float32(rng.normal(size=(8, 16)))
  keys = jax.random.split(jax.random.key(0), 4000)
  draws = jax.vmap(lambda key: int8_weights.encode(w, 32, key).dense())(keys)
  found = int8_weights.encode(w, 32)
  by_step = jnp.abs(draws - w).max() / found.step.max()
  assert 0.5 < by_step <= 1.001
  # A deviation of at most half a step in each of 4000 draws; the ends of a
  # group are codes 0 and 255, beyond which there are none: a step at most.
  inner = np.asarray(jnp.abs(draws.mean(0) - w) / found.step.max())
  assert np.median(inner) < 0.01
  assert (inner < 0.04).mean() > 0.9
  nearest = np.abs(np.asarray(found.dense() - w)) / np.asarray(found.step.max())
  assert np.median(nearest) > 0.1


class Product:
  """Squared errors of a matrix in a stack of one, read as layers read it."""

  def __call__(self, params, batch, key):
    del key
    w = jax.tree.map(lambda x: x[0], params["run0"]["layer0"]["up"])
    y = weights.einsum("...d,df->...f", batch["x"], w)
    return 0.5 * ((y - batch["y"]) ** 2).sum(), jnp.ones(()), {}


def batch(size_in=16, size_out=24, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "x": np.float32(rng.normal(size=(6, size_in))),
    "y": np.float32(rng.normal(size=(6, size_out))),
  }


def groups(x, group, top):
  rows = x.T.reshape(-1, group)
  low = rows.min(1, keepdims=True)
  scale = np.maximum(rows.max(1, keepdims=True) - low, 1e-5) / top
  return rows, scale, np.clip(-np.round(low / scale), 0, top)


def rounded(x, group, top):
  rows, scale, zero = groups(x, group, top)
  codes = np.clip(np.round(rows / scale) + zero, 0, top)
  return (scale * (codes - zero)).reshape(x.T.shape).T, scale


def qgalore(rate=0.1, **fields):
  return layerwise.galore(
    rate,
    Projection(rank=4, every=1),
    moments=optax.scale_by_adam(eps=1e-6),
    matrices="up$",
    weight_decay=0.01,
    storage=projectors.Int4(group=16),
    pace=projectors.Lazy(last=2),
    **fields,
  )


def begun(w, tx):
  params = {"run0": {"layer0": {"up": w}}}
  whole = state.TrainState(jnp.int32(0), params, None, tx.init(params))
  empty = jax.tree.map(lambda x: None, params)
  return dataclasses.replace(whole, frozen=empty)


@pytest.mark.slow
def test_a_step_is_numpys():
  rng = np.random.default_rng(1)
  w = np.float32(rng.normal(size=(16, 24)))
  packed = int8_weights.encode(jnp.asarray(w)[None], 32)
  tx, data = qgalore(), batch()
  after, metrics = jax.jit(step.make_train_step(Product(), tx))(
    begun(packed, tx), data, jax.random.key(0)
  )
  before = rounded(w, 32, 255)[0]
  np.testing.assert_allclose(packed.dense()[0], before, atol=1e-6)
  g = data["x"].T @ (data["x"] @ before - data["y"])
  p = np.linalg.svd(g, full_matrices=False)[0][:, :4]
  # Of a vector's two signs LAPACK chooses one, and codes differ.
  held = after.opt_state.projector["run0"]["layer0"]["up"]
  storage = projectors.Int4(group=16)
  found = np.asarray(storage.decode(storage.unpack(held), (1, 16, 4))[0])
  p = p * np.sign((p * found).sum(0))
  p = rounded(p, 16, 15)[0]
  np.testing.assert_allclose(found, p, atol=1e-5)
  r = p.T @ g
  np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(r), rtol=1e-5)
  n = r / (np.abs(r) + 1e-6)
  want = before - 0.1 * (0.25 * p @ n + 0.01 * before)
  got = after.trainable["run0"]["layer0"]["up"]
  assert got.codes.dtype == jnp.uint8
  rows, scale, zero = groups(want, 32, 255)
  # By chance the code below or above, but for the ends of the range.
  codes, exact = np.asarray(got.codes[0], np.float32), rows / scale + zero
  assert (np.abs(codes - np.clip(exact, 0, 255)) < 1.001).all()
  assert (codes < np.clip(exact, 0, 255) - 0.01).mean() > 0.3
  np.testing.assert_allclose(got.step[0], scale, rtol=1e-4)


def test_small_moves_count_in_the_mean():
  """A hundred moves of a fiftieth of a step, which rounding would lose."""
  rng = np.random.default_rng(2)
  w = jnp.float32(rng.uniform(-1, 1, size=(64, 64)))
  near = int8_weights.encode(w)
  move = float(near.step.mean()) / 50

  @jax.jit
  def moved(packed, key):
    return packed.renewed(packed.dense() + move, key)

  packed, lost = near, near
  for k in range(100):
    packed = moved(packed, jax.random.key(k))
    lost = int8_weights.encode(lost.dense() + move)
  gone = float((packed.dense() - near.dense()).mean()) / (100 * move)
  np.testing.assert_allclose(gone, 1, atol=0.1)
  assert abs(float((lost.dense() - near.dense()).mean())) < 10 * move


def test_bytes_of_the_state():
  """Weights and projectors as codes: no float of a matrix's size is left."""
  size = 64
  packed = int8_weights.encode(jnp.zeros((1, size, size)), 256)
  tx = qgalore()
  held = begun(packed, tx)
  matrix = [x for x in jax.tree.leaves(held) if x.size >= size * size]
  assert [x.dtype for x in matrix] == [jnp.uint8]
  codes = held.opt_state.projector["run0"]["layer0"]["up"]["codes"]
  assert tree.nbytes(codes) == size * 4 // 2


def test_bad_use():
  with pytest.raises(UserError, match="groups of 256 do not divide 8 x 16"):
    int8_weights.encode(jnp.ones((8, 16)))
  with pytest.raises(UserError, match="256 does not divide a projector"):
    projectors.Int4().encode(jnp.ones((8, 4)))
