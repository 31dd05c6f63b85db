"""Sharding rules, for every kind of tree."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from research import sharding, tree, weights
from research.lora import adapt
from research.lora.methods.lora import LoRA
from research.nn.moe.routing import Routing
from research.nn.presets import Sparse
from research.quant import qtensor
from research.quant.formats import ggml
from research.training import state
from research.typing import UserError
from tests import support

LAYOUT = sharding.Layout(data=1, fsdp=2, tensor=2, expert=2)


def llama():
  return support.model("llama", vocab=64)


def sparse():
  experts = Sparse(routing=Routing(experts=4, active=2), hidden=16)
  return support.model("mixtral", vocab=64, sparse=experts)


def specs(tree_, layout=LAYOUT, counts=None):
  found = layout.shardings(tree_, layout.mesh(), counts)
  return {path: s.spec for path, s in tree.flatten_paths(found)}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3"])
def test_every_parameter_of_a_family_has_a_row(family):
  found = specs(support.shapes(support.model(family, vocab=64)))
  assert found["embed"] == P("tensor", "fsdp")
  assert found["run0/layer0/attention/q"] == P(None, "fsdp", "tensor")
  assert found["run0/layer0/attention/o"] == P(None, "tensor", "fsdp")
  assert found["final_norm/scale"] == P()


def test_experts_are_cut_over_their_own_axis():
  found = specs(support.shapes(sparse()))
  up = next(p for p in found if p.endswith("experts/up"))
  down = next(p for p in found if p.endswith("experts/down"))
  assert found[up] == P(None, "expert", "fsdp", "tensor")
  assert found[down] == P(None, "expert", "tensor", "fsdp")


def test_keys_of_dropout_have_no_axes():
  """They are bound to adapters in every step, and belong to no device."""
  params = support.params(llama())
  adapted = adapt.Adapt(method=LoRA(rank=4, dropout=0.5))(
    params, jax.random.key(0)
  )
  bound = weights.bind(adapted, key=jax.random.key(1))
  leaf = bound["run0"]["layer0"]["attention"]["q"]
  names = ("layers", "width", "heads")
  found = sharding.part_names(leaf, names)
  assert found.w.names == names and found.key.names == ()


def test_a_training_state_is_cut_like_its_parameters():
  params = jax.eval_shape(
    adapt.Adapt(method=LoRA(rank=4)), support.shapes(llama()), jax.random.key(0)
  )
  tx = optax.adamw(1e-3)
  whole = jax.eval_shape(
    lambda p: state.create(p, "/trained/", tx, average=True), params
  )
  found = specs(whole)
  for part in ("trainable", "ema", "opt_state/0/mu", "opt_state/0/nu"):
    prefix = f"{part}/run0/layer0/attention/q"
    # The factors keep the names of the axes that they touch; the rank none.
    assert found[f"{prefix}/trained/a"] == P(None, None, "fsdp")
    assert found[f"{prefix}/trained/b"] == P(None, None, "tensor")
  assert found["frozen/run0/layer0/attention/q/w"] == P(None, "fsdp", "tensor")
  assert found["step"] == found["opt_state/0/count"] == P()


@pytest.mark.parametrize("axis", [-2, -1])
def test_packed_parts_follow_their_blocks(axis):
  part = jax.ShapeDtypeStruct
  w = qtensor.QTensor(
    dict(
      codes=part((3, 4, 16, 64), jnp.uint8),
      scale=part((3, 4, 64), jnp.float16),
      offset=part((3, 4, 64), jnp.float16),
    ),
    format=ggml.GGML(kind="Q4_1"),
    inputs=128,
    outputs=64,
    axis=axis,
  )
  found = specs({"run0": {"layer0": {"mlp": {"up": w}}}})
  x, rows = ("fsdp", "tensor") if axis == -2 else ("tensor", "fsdp")
  assert found["run0/layer0/mlp/up/parts/codes"] == P(None, x, None, rows)
  assert found["run0/layer0/mlp/up/parts/scale"] == P(None, x, rows)
  assert found["run0/layer0/mlp/up/parts/offset"] == P(None, x, rows)


def test_an_axis_that_does_not_divide_is_not_cut():
  layout = sharding.Layout(data=1, tensor=8)
  params = {"a": {"gate": jnp.zeros((6, 12)), "down": jnp.zeros((16, 6))}}
  assert specs(params, layout) == {"a/down": P("tensor"), "a/gate": P()}
  assert layout.undivided(params, layout.mesh()) == ["hidden of 12 (a/gate)"]


def test_heads_are_not_cut_into_pieces():
  params = {"x": {"attention": {"k": jnp.zeros((8, 32))}}}
  layout = sharding.Layout(data=1, tensor=4)
  assert specs(params, layout)["x/attention/k"] == P(None, "tensor")
  assert specs(params, layout, {"kv_heads": 2})["x/attention/k"] == P()
  said = ["kv_heads of 2 (x/attention/k)"]
  assert layout.undivided(params, layout.mesh(), {"kv_heads": 2}) == said
  assert layout.undivided(params, layout.mesh()) == []


def test_counts_are_those_of_the_heads():
  model = support.model("llama")
  attention = model.layer_kinds()[0].attention
  assert sharding.head_counts(model) == {
    "heads": attention.heads,
    "kv_heads": attention.kv_heads,
  }


def test_an_array_without_a_row_is_an_error():
  with pytest.raises(UserError, match=r"x/strange: no row of Layout.axes"):
    specs({"x": {"strange": jnp.zeros((4, 4))}})


def test_a_mesh_axis_twice_is_an_error():
  layout = sharding.Layout(
    data=1, fsdp=2, rules={"width": "fsdp", "hidden": "fsdp"}
  )
  with pytest.raises(UserError, match="can shard only"):
    specs({"x": {"gate": jnp.zeros((4, 4))}}, layout)


@pytest.mark.parametrize(
  ("sizes", "match"),
  [
    (dict(data=-1, fsdp=-1), "at most one -1"),
    (dict(data=0), "Layout.data: found 0"),
    (dict(data=-1, fsdp=3), "needs 3 devices, found 8"),
    (dict(data=16), "needs 16 devices, found 8"),
  ],
)
def test_impossible_meshes(sizes, match):
  with pytest.raises(UserError, match=match):
    sharding.Layout(**sizes).mesh()


def test_what_is_left_goes_to_one_axis():
  mesh = sharding.Layout(data=2, fsdp=-1, tensor=2).mesh()
  assert tuple(mesh.shape.values()) == (2, 2, 1, 1, 1, 2, 1)
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_bytes_per_device_are_those_of_the_shards():
  params = support.params(llama())
  mesh = LAYOUT.mesh()
  shardings = LAYOUT.shardings(params, mesh)
  placed = jax.device_put(params, shardings)
  first = mesh.devices.flat[0]
  held = sum(
    s.data.nbytes
    for x in jax.tree.leaves(placed)
    for s in x.addressable_shards
    if s.device == first
  )
  assert sharding.bytes_per_device(params, shardings) == held
  chex.assert_trees_all_equal(placed, params)


def test_activations_are_cut_only_where_a_mesh_is_set():
  x = jnp.zeros((4, 6, 8))

  def f(x):
    return sharding.constrain(x, "batch", "length", "hidden")

  assert f(x) is x
  layout = sharding.Layout(data=2, sequence=2, tensor=2)
  with jax.set_mesh(layout.mesh()):
    y = jax.jit(f)(x)
  # The batch's three axes, of which two have one device.
  assert y.sharding.spec == P("data", "sequence", "tensor")
  np.testing.assert_array_equal(x, y)
