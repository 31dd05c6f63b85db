"""Training on eight devices is training on one, whatever is cut how."""

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
  *(("plain", m) for m in ("data", "fsdp", "tensor", "mixed", "sequence")),
  *(("lora", m) for m in ("tensor", "mixed")),
  ("packed", "mixed"),
  *(("qlora", m) for m in ("mixed", "sequence")),
  *(("experts", m) for m in ("expert", "experts")),
  ("experts-qlora", "expert"),
)


@functools.cache
def trained(kind, layout, steps):
  batches = [support_mesh.batch(seed) for seed in range(steps)]
  compiled = support_mesh.compiled(kind, layout)
  return compiled.run(support_mesh.start(kind), batches)


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_loss_and_every_gradient_are_one_devices(kind, layout):
  (want, (alone,)), (got, (shared,)) = (
    trained(kind, which, 1) for which in ("one", layout)
  )
  # Means over 64 targets: sums of some thousand float32 terms near 1.
  chex.assert_trees_all_close(shared["loss"], alone["loss"], rtol=3e-6)
  want, got = (
    jax.tree.map(
      lambda m: m / support_mesh.MEMORY,
      dict(tree.flatten_paths(s.opt_state[0].mu)),
    )
    for s in (want, got)
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


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_twenty_steps_are_one_devices(kind, layout):
  (want, alone), (got, shared) = (
    trained(kind, which, STEPS) for which in ("one", layout)
  )
  first, last = (
    [m[i]["loss"] for m in (alone, shared)] for i in (0, STEPS - 1)
  )
  assert last[0] < first[0]
  for name in alone[0]:
    # An update amplifies a gradient's error by at most lr / eps = 10.
    np.testing.assert_allclose(
      [m[name] for m in shared], [m[name] for m in alone], rtol=3e-4, atol=3e-5
    )
  chex.assert_trees_all_close(got.trainable, want.trainable, rtol=0, atol=1e-4)
  chex.assert_trees_all_equal(got.frozen, want.frozen)
  assert got.step == want.step == STEPS


@pytest.mark.parametrize("kind", ["plain", "experts"])
def test_random_initialisation_is_bitwise_one_devices(kind):
  model = support_mesh.model(kind)
  shapes = support.shapes(model)

  def init(key):
    return model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

  want = jax.jit(init)(jax.random.key(5))
  for name in ("data", "fsdp", "tensor", "mixed", "experts"):
    layout = support_mesh.LAYOUTS[name]
    mesh = layout.mesh()
    place = layout.shardings(shapes, mesh, sharding.counts(model))
    with jax.set_mesh(mesh):
      got = jax.jit(init, out_shardings=place)(jax.random.key(5))
    chex.assert_trees_all_equal(got, want)
