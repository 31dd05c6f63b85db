"""Tests that every method computes the same on eight devices as on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree
from research.lora import wrap
from research.lora.methods.svd_init import DecompositionInit
from tests import support_mesh
from tests.research.lora.methods import test_methods as methods

ROWS = 8


def _chosen():
  """Returns a method of each class, by label; BD-LoRA's sides are two.

  Only one of those that differ by initialisation alone.
  """
  found = {}
  for method in methods.METHODS:
    kind = (
      DecompositionInit
      if isinstance(method, DecompositionInit)
      else type(method)
    )
    found.setdefault((kind, getattr(method, "side", None)), method)
  return {methods.label(m): m for m in found.values()}


METHODS = _chosen()

WHOLE = {
  *("C3A", "FourierFT", "GraLoRA", "LoKr", "MoRA", "OFT", "RandLoRA"),
  *("SHiRA", "TinyLoRA"),
}
"""Methods that learn small cores, blocks or places: none is cut."""


def _leaf(method):
  """Returns one adapted matrix with random arrays, named as in an MLP."""
  return {"mlp": {"up": methods.one(methods.moved(method))}}


def _loss(learned, frozen, x):
  outputs = {
    name: leaf["mlp"]["up"].einsum("...i,io->...o", x)
    for name, leaf in tree.combine(learned, frozen).items()
  }
  # A weight an output, so that no gradient cancels.
  loss = sum(jnp.sum(y * methods.waves(y)) for y in outputs.values())
  return loss, outputs


@functools.cache
def placed(layout: str):
  """Returns the layout, its mesh, (learned, frozen), and their shardings."""
  plan = support_mesh.LAYOUTS[layout]
  mesh = plan.mesh()
  params = {name: _leaf(m) for name, m in METHODS.items()}
  halves = tree.partition(params, wrap.TRAINABLE)
  return plan, mesh, halves, tuple(plan.shardings(x, mesh) for x in halves)


@functools.cache
def computed(layout: str):
  """Returns outputs and gradients of all methods; one program."""
  plan, mesh, halves, places = placed(layout)
  x = jax.device_put(methods.draw(ROWS, 4, methods.IN), plan.batch(mesh))
  with jax.set_mesh(mesh):
    f = jax.jit(
      jax.value_and_grad(_loss, has_aux=True),
      in_shardings=(*places, plan.batch(mesh)),
    )
    halves = jax.device_put(halves, places)
    done = f.lower(*halves, x).compile(support_mesh.QUICKLY)
    (_, outputs), gradients = done(*halves, x)
  return jax.tree.map(np.asarray, (outputs, gradients))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.sample(3)
def test_outputs_and_gradients_are_one_devices(name):
  wanted, alone = computed("one")
  found, shared = computed("mixed")
  methods.close(jnp.asarray(found[name]), jnp.asarray(wanted[name]))
  want, got = (dict(tree.flatten_paths(g[name])) for g in (alone, shared))
  assert want.keys() == got.keys() and want
  for path, x in want.items():
    scale = np.abs(x).max()
    assert scale > 0, path
    # Sums over rows, then over a side of the matrix, in another order.
    np.testing.assert_allclose(
      got[path], x, rtol=1e-4, atol=3e-5 * scale, err_msg=path
    )


def test_all_arrays_with_a_side_of_the_matrix_are_sharded():
  _, _, _, (learned, _) = placed("mixed")
  whole = {
    type(METHODS[name]).__name__
    for name, places in learned.items()
    if all(s.is_fully_replicated for s in jax.tree.leaves(places))
  }
  assert whole == WHOLE
