"""Tests that cached inputs equal recomputed ones, and are not recomputed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree, weights
from research.nn.moe.routing import Routing
from research.nn.presets import Sparse
from research.quant import activation_cache
from research.quant.activations import InputTensor, Round
from research.quant.algorithms import calibrate, error_propagation
from research.quant.algorithms.calibrate import LayerInputs
from research.taps.statistics import Covariance, Gradient, Magnitudes
from research.typing import UserError
from tests import support

EPS = float(jnp.finfo(jnp.float32).eps)
STAGES = (["attention/q"], ["attention/o"], ["mlp/up"], ["mlp/down"])
EXPERTS = (["attention/o"], ["mlp/experts/down"])
SPARSE = Sparse(routing=Routing(experts=3, active=2), hidden=12)


@functools.cache
def problem(family="llama", **changes):
  """Returns (a layer, another one, the former's inputs in two batches)."""
  model = support.model(family, **changes)
  params = support.params(model)
  other = support.params(model, seed=1)
  x = calibrate.embed(model, params, support.tokens(5, 7))
  old, new = next(tree.layers(params)), next(tree.layers(other))
  return old, new, LayerInputs(model.layer_kinds()[0], x, 3)


def fresh(inputs):
  """Returns inputs with an empty cache."""
  return dataclasses.replace(inputs)


def swapped(layer, other, paths):
  """Returns `layer` with some weights of another."""
  found, _ = jax.tree_util.tree_flatten_with_path(
    other, is_leaf=weights.is_weight
  )
  given = {tree.path_name(path): w for path, w in found}
  return tree.map_paths(
    lambda path, w: given[path] if path in paths else w,
    layer,
    is_leaf=weights.is_weight,
  )


def sequential(inputs, old, new, stages, remember):
  """Returns the inputs of matrices that are replaced in the order of use.

  Args:
    inputs: the layer's.
    old: the layer as it was.
    new: where matrices are taken from, once seen.
    stages: paths that are seen together.
    remember: whether one call knows of those before it.
  """
  out, layer, inputs = [], old, fresh(inputs)
  for paths in stages:
    given = inputs if remember else fresh(inputs)
    out.append(given.measure(layer, paths, Covariance()))
    layer = swapped(layer, new, paths)
  given = inputs if remember else fresh(inputs)
  return [*out, given.outputs(layer)], activation_cache.still_valid(
    inputs.memory, layer
  )


def close(got, want):
  def one(a, b):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    np.testing.assert_allclose(a, b, atol=100 * EPS * abs(b).max())

  jax.tree.map(one, got, want)


@pytest.mark.slow
@pytest.mark.parametrize(
  "family, dtype, stages, kept",
  [
    ("llama", "float32", STAGES, ["attention/o", "mlp/down"]),
    ("gemma2", "bfloat16", STAGES, ["attention/o", "mlp/down"]),
    ("mixtral", "float32", EXPERTS, ["attention/o"]),
  ],
)
def test_cached_inputs_equal_recomputed_ones(family, dtype, stages, kept):
  sparse = dict(sparse=SPARSE) if family == "mixtral" else {}
  old, new, inputs = problem(family, **sparse)
  inputs = dataclasses.replace(inputs, x=inputs.x.astype(dtype))
  got, held = sequential(inputs, old, new, stages, remember=True)
  want, _ = sequential(inputs, old, new, stages, remember=False)
  assert list(held) == kept
  close(got, want)


@pytest.mark.parametrize(
  "changed, kept",
  [
    ("mlp/down", ["attention/o", "mlp/down"]),
    ("mlp/gate", ["attention/o"]),
    ("attention/o", ["attention/o"]),
    ("attention/q", []),
    ("attention_norm/scale", []),
  ],
)
def test_what_something_new_leads_to_is_computed(changed, kept):
  old, new, inputs = problem()
  inputs = fresh(inputs)
  inputs.measure(old, ["attention/o", "mlp/down"], Covariance())
  layer = swapped(old, new, [changed])
  assert list(activation_cache.still_valid(inputs.memory, layer)) == kept
  close(inputs.outputs(layer), fresh(inputs).outputs(layer))


def test_a_second_statistic_is_of_the_same_inputs():
  layer, _, inputs = problem()
  paths = ["attention/o", "mlp/down"]
  want = fresh(inputs).measure(layer, paths, Magnitudes())
  known = fresh(inputs)
  known.measure(layer, paths, Covariance())
  # What leads there is none of the program's business any more.
  for held in known.memory.values():
    held.rows[:] = [2 * x for x in held.rows]
  found = known.measure(layer, paths, Magnitudes())
  for path in paths:
    close(found[path]["sizes"], 2 * want[path]["sizes"])
    close(found[path]["n"], want[path]["n"])


def test_outputs_take_two_products():
  layer, _, inputs = problem()
  inputs = fresh(inputs)
  inputs.measure(layer, ["attention/o", "mlp/down"], Covariance())
  x = inputs.batches()[0]

  def flops(layer):
    lowered = calibrate.outputs.lower(inputs.block, layer, x)
    return lowered.compile().cost_analysis()["flops"]

  held = activation_cache.still_valid(inputs.memory, layer)
  two = [layer["attention"]["o"], layer["mlp"]["down"]]
  products = 2 * x.shape[0] * x.shape[1] * sum(w.size for w in two)
  assert (
    products
    <= flops(activation_cache.with_cached_inputs(layer, held, 0))
    < 1.1 * products
  )
  assert flops(layer) > 3 * products


def rounding(layer, scale):
  """Returns a layer whose matrices round their inputs."""
  op = Round(per="tensor")
  return jax.tree.map(
    lambda w: w if w.ndim < 2 else InputTensor(w, scale, op), layer
  )


@pytest.mark.slow
def test_cached_inputs_are_those_that_are_multiplied():
  old, new, inputs = problem()
  scale = jnp.float32(0.05)
  old, new = rounding(old, scale), rounding(new, scale)
  got, held = sequential(inputs, old, new, STAGES, remember=True)
  want, _ = sequential(inputs, old, new, STAGES, remember=False)
  assert list(held) == ["attention/o", "mlp/down"]
  close(got, want)
  rows = held["attention/o"].rows[0] / scale
  np.testing.assert_allclose(rows, np.round(rows), atol=1e-3)


def test_a_change_of_input_rounding_invalidates_the_cache():
  layer, _, inputs = problem()
  inputs = fresh(inputs)
  coarse, fine = (
    swapped(layer, rounding(layer, jnp.float32(scale)), ["attention/o"])
    for scale in (0.5, 0.01)
  )
  inputs.measure(coarse, ["attention/o"], Covariance())
  assert list(activation_cache.still_valid(inputs.memory, coarse)) == [
    "attention/o"
  ]
  assert not activation_cache.still_valid(inputs.memory, fine)


@pytest.mark.slow
def test_pairs_of_layers_use_the_cache():
  old, new, inputs = problem()
  x = jnp.concatenate([inputs.x, inputs.x + 0.1])
  inputs = LayerInputs(inputs.block, x, len(x))
  norms = [p for p, _ in tree.flatten_paths(old) if "norm" in p]
  new, changed = swapped(new, old, norms), old
  known, found = fresh(inputs), []
  for paths in STAGES:
    pair = error_propagation.pair_weights(old, changed)
    found.append(known.measure(pair, paths, error_propagation.DriftStatistic()))
    close(
      found[-1],
      fresh(inputs).measure(pair, paths, error_propagation.DriftStatistic()),
    )
    changed = swapped(changed, new, paths)
  pair = error_propagation.pair_weights(old, changed)
  assert list(activation_cache.still_valid(known.memory, pair)) == [
    "attention/o",
    "mlp/down",
  ]
  close(known.outputs(pair), fresh(inputs).outputs(pair))


def test_experts_are_not_cached():
  w = activation_cache.CachedInputTensor(
    jnp.ones((2, 3, 4)), jnp.ones((1, 5, 3))
  )
  with pytest.raises(UserError, match="expected a matrix"):
    weights.ragged_dot(jnp.ones((5, 3)), w, jnp.asarray([2, 3]))


@pytest.mark.slow
def test_gradients_are_those_of_the_whole_layer():
  old, _, inputs = problem()
  inputs = fresh(inputs)
  for path in ("attention/o", "mlp/down"):
    inputs.measure(old, [path], Covariance())
  for path in ("attention/o", "attention/q", "mlp/up"):
    ours = inputs.measure(old, [path], Gradient())[path]["g"]
    theirs = fresh(inputs).measure(old, [path], Gradient())[path]["g"]
    assert np.any(theirs)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_a_router_is_measured_with_cached_inputs():
  old, _, inputs = problem("mixtral", sparse=SPARSE)
  paths = ["attention/o", "mlp/router"]
  ours = fresh(inputs).measure(old, paths, Covariance())
  for path in paths:
    (theirs,) = fresh(inputs).measure(old, [path], Covariance()).values()
    np.testing.assert_allclose(
      ours[path]["xx"], theirs["xx"], rtol=10 * EPS, atol=10 * EPS
    )


def test_other_inputs_have_no_cache():
  old, _, inputs = problem()
  inputs = fresh(inputs)
  inputs.measure(old, ["attention/o"], Covariance())
  assert inputs.memory and not dataclasses.replace(inputs, batch=2).memory
