"""Training on eight devices is training on one, whatever is cut how."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import sharding, tree
from tests import support, support_mesh

STEPS = 20
CASES = (
  *(("plain", m) for m in ("mixed", "ring", "ulysses")),
  *(("lora", "mixed"), ("packed", "mixed"), ("qlora", "sequence")),
  ("experts", "experts"),
  *(
    pytest.param(kind, layout, marks=pytest.mark.slow)
    for kind, layout in (
      *(("plain", m) for m in ("data", "fsdp", "tensor", "sequence")),
      *(("lora", "tensor"), ("qlora", "mixed"), ("experts", "expert")),
      ("experts-qlora", "expert"),
    )
  ),
)


@functools.cache
def trained(kind, layout, steps):
  batches = [support_mesh.batch(seed % 4) for seed in range(steps)]
  compiled = support_mesh.compiled(kind, layout)
  return compiled.run(support_mesh.start(kind), batches)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), CASES)
@pytest.mark.sample(15)
def test_loss_and_every_gradient_are_one_devices(kind, layout):
  (want, alone), (got, shared) = (
    trained(kind, which, 1) for which in ("one", layout)
  )
  # Means over 64 targets: sums of some thousand float32 terms near 1.
  np.testing.assert_allclose(shared["loss"], alone["loss"], rtol=3e-6)
  want, got = (
    {path: m / support_mesh.MEMORY for path, m in tree.flatten_paths(mu)}
    for mu in (s.opt_state[0].mu for s in (want, got))
  )
  assert want.keys() == got.keys() and want
  for path in want:
    # Each is a sum over up to 128 positions and as many again on the way:
    # errors are relative to the largest entry, not to one that cancels.
    scale = np.abs(want[path]).max()
    assert scale > 1e-5, path
    np.testing.assert_allclose(
      got[path], want[path], rtol=1e-4, atol=3e-5 * scale, err_msg=path
    )


@functools.cache
def rounding(kind):
  """Returns how far apart rounding errors drive twenty steps of one device.

  Largest differences, of each metric and of the parameters, between a run and
  four whose start is off by about one unit in the last place.
  """
  want = trained(kind, "one", STEPS)
  batches = [support_mesh.batch(seed % 4) for seed in range(STEPS)]
  start, far = support_mesh.start(kind), None
  for seed in range(4):
    rng = np.random.default_rng(seed)

    def off(x, rng=rng):
      noise = rng.uniform(-(2.0**-23), 2.0**-23, x.shape)
      return (np.asarray(x) * (1 + noise)).astype(np.float32)

    moved = dataclasses.replace(
      start, trainable=jax.tree.map(off, start.trainable)
    )
    got = support_mesh.compiled(kind, "one").run(moved, batches)
    now = differences(got, want)
    far = now if far is None else jax.tree.map(np.maximum, now, far)
  return far


def differences(got, want):
  metrics = {k: np.abs(got[1][k] - want[1][k]).max() for k in want[1]}
  moved = jax.tree.map(
    lambda a, b: np.abs(a - b).max(), got[0].trainable, want[0].trainable
  )
  return metrics | {"parameters": max(jax.tree.leaves(moved))}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), CASES)
@pytest.mark.sample(8)
def test_twenty_steps_are_one_devices(kind, layout):
  """Reordered sums drive runs apart as far as rounding the start does."""
  (want, alone), (got, shared) = (
    trained(kind, which, STEPS) for which in ("one", layout)
  )
  assert alone["loss"][-4:].mean() < 0.95 * alone["loss"][:4].mean()
  allowed = rounding(kind)
  found = differences((got, shared), (want, alone))
  for name, difference in found.items():
    # Each step rounds anew, not the start alone; all metrics are near 1.
    assert difference <= 20 * allowed[name] + 1e-6, (name, found, allowed)
  assert allowed["loss"] < 1e-2 and allowed["parameters"] < 1e-2
  chex.assert_trees_all_equal(got.frozen, want.frozen)
  assert got.step == want.step == STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "layouts"),
  [
    ("plain", ("fsdp", "mixed")),
    ("experts", ("expert",)),
    pytest.param(
      "plain", ("data", "tensor", "sequence"), marks=pytest.mark.slow
    ),
    pytest.param("experts", ("experts", "mixed"), marks=pytest.mark.slow),
  ],
)
@pytest.mark.sample(2)
def test_random_initialisation_is_bitwise_one_devices(kind, layouts):
  model = support_mesh.model(kind)
  shapes = support.shapes(model)

  def init(key):
    return model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

  want = jax.jit(init)(jax.random.key(5))
  for name in layouts:
    layout = support_mesh.LAYOUTS[name]
    mesh = layout.mesh()
    place = layout.shardings(shapes, mesh, sharding.head_counts(model))
    with jax.set_mesh(mesh):
      got = jax.jit(init, out_shardings=place)(jax.random.key(5))
    chex.assert_trees_all_equal(got, want)
