"""Trees of parameters: parts, runs, and reports."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree
from research.typing import UserError
from tests.support_lora import lora


def _layer(value, width=2, extra=False):
  layer = {"w": np.full((width, 3), value, np.float32)}
  return {**layer, "bias": np.zeros(3)} if extra else layer


def test_partition_and_combine_are_inverse():
  params = {
    "run0": {"q": lora(jnp.ones((2, 4, 3)), jnp.ones((2, 1, 4)),
                             jnp.zeros((2, 1, 3)), scale=2.0)},
    "embed": jnp.ones((5, 4)),
  }  # fmt: skip
  selected, rest = tree.partition(params, r"/trained/")
  assert [p for p, _ in tree.flatten_paths(selected)] == [
    "run0/q/trained/a",
    "run0/q/trained/b",
  ]
  assert [p for p, _ in tree.flatten_paths(rest)] == ["embed", "run0/q/w"]
  chex.assert_trees_all_equal(tree.combine(selected, rest), params)
  chex.assert_trees_all_equal(tree.combine(rest, selected), params)


@pytest.mark.parametrize(
  ("kinds", "runs"),
  [
    ("aaaa", [(4, 1)]),
    ("ababab", [(3, 2)]),
    ("lllllglllllgll", [(2, 6), (1, 2)]),
    ("aaaabbbb", [(4, 1), (4, 1)]),
    ("abbb", [(1, 1), (3, 1)]),
    ("aaaaabbbbbb", [(5, 1), (6, 1)]),
    ("a", [(1, 1)]),
    ("aaabbabbabbabbaaaa", [(2, 1), (4, 3), (4, 1)]),
    ("abacabad", [(1, 1)] * 8),
  ],
)
def test_plan(kinds, runs):
  assert tree.plan(kinds) == runs
  assert sum(n * p for n, p in runs) == len(kinds)


def test_layers_that_differ_in_structure_or_shape_part_runs():
  layers = [_layer(i, width=2 if i < 5 else 4, extra=i > 8) for i in range(11)]
  params = tree.stack({"embed": np.zeros((3, 2))}, layers)
  assert [tree.run_length(params[name]) for name in tree.runs(params)] == [
    5,
    4,
    2,
  ]
  chex.assert_trees_all_equal(list(tree.layers(params)), layers)
  unrolled = tree.unroll(params)
  assert tree.runs(unrolled) == [f"run{i}" for i in range(11)]
  chex.assert_trees_all_equal(list(tree.layers(unrolled)), layers)
  chex.assert_trees_all_equal(
    tree.outer_params(unrolled), tree.outer_params(params)
  )


@pytest.mark.parametrize(
  ("kinds", "runs"),
  [
    ("aaaa", [(3, 1), (1, 1)]),
    ("ababab", [(2, 2), (1, 1), (1, 1)]),
    ("aaab", [(3, 1), (1, 1)]),
    ("a", [(1, 1)]),
  ],
)
def test_the_last_layer_apart(kinds, runs):
  layers = [_layer(i) for i in range(len(kinds))]
  params = tree.stack({"embed": np.zeros((3, 2))}, layers, kinds=kinds)
  apart = tree.last_apart(params)
  found = [apart[name] for name in tree.runs(apart)]
  assert [(tree.run_length(run), len(run)) for run in found] == runs
  chex.assert_trees_all_equal(list(tree.layers(apart)), layers)
  chex.assert_trees_all_equal(
    tree.outer_params(apart), tree.outer_params(params)
  )
  assert (
    tree.layer_indices(apart)[f"run{len(runs) - 1}/layer0"][-1]
    == len(kinds) - 1
  )


def test_kinds_must_fit():
  with pytest.raises(UserError, match="2 layers were given for 3 kinds"):
    tree.stack({}, [_layer(0), _layer(1)], kinds="abc")


def test_sizes_count_what_is_stored():
  params = {"a": jnp.zeros((3, 4), jnp.bfloat16), "b": np.zeros(5, np.uint8)}
  assert tree.count(params) == 17
  assert tree.nbytes(params) == 29
  shapes = jax.eval_shape(lambda: params)
  assert tree.nbytes(shapes) == 29


def test_describe_names_every_array_once():
  params = {"a": {"w": jnp.zeros((3, 4))}, "b": jnp.zeros(())}
  table = tree.describe(params, trainable="^a").splitlines()
  assert len(table) == 3
  assert table[1].split() == ["a/w", "3x4", "float32", "yes", "48"]
  assert table[2].split() == ["b", "scalar", "float32", "4"]


def test_values_go_where_the_weights_are_tied():
  device, values = (
    jax.devices()[1],
    {"x": jnp.arange(3), "key": jax.random.key(0)},
  )
  tied = {"w": np.ones(3), "v": jax.device_put(jnp.ones(3), device)}
  found = tree.device_put_like(values, tied)
  for x in jax.tree.leaves(found):
    assert x.committed and x.devices() == {device}
  chex.assert_trees_all_equal(found["x"], np.arange(3))
  assert (
    tree.device_put_like(values, {"w": np.ones(3), "v": jnp.ones(3)}) is values
  )
  mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
  spec = jax.sharding.PartitionSpec("data")
  cut = jax.device_put(jnp.ones(2), jax.sharding.NamedSharding(mesh, spec))
  assert tree.device_put_like(values, {"w": cut}) is values
