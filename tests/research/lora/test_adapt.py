"""Tests `Adapt`: targets, initialisation and outputs."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree, weights
from research.interop.peft import full_weights
from research.lora import adapt, to_lora, wrap
from research.lora.adapted import AdaptedTensor
from research.lora.merge import merge
from research.lora.methods.lora import LoRA
from research.lora.optim import row_factors
from research.nn import presets
from research.quant.activations import Inputs, Round
from research.quant.algorithms import qat, rotate
from research.quant.formats.affine import Affine
from research.typing import UserError
from tests import support
from tests.support_lora import adapting

LINEARS = {
  *(f"attention/{x}" for x in "qkvo"),
  *(f"mlp/{x}" for x in ("gate", "up", "down")),
}
KEY = jax.random.key(0)


def build(family="llama", **sizes):
  defaults = dict(
    vocab=19, width=12, depth=4, heads=2, kv_heads=1, hidden=10, head_dim=6
  )
  model = presets.transformer(
    presets.FAMILIES[family], presets.Sizes(**(defaults | sizes))
  )
  start = jax.jit(model.init)(KEY, jnp.zeros((1, 1), jnp.int32))
  return model, start["params"]


@functools.cache
def llama():
  return build()


@functools.cache
def gemma():
  # A period of two layers, three times.
  return build("gemma2", depth=6, window=3)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
  tokens = jnp.arange(14).reshape(2, 7) % 19
  hidden, _ = model.apply({"params": params}, tokens)
  return model.apply({"params": params}, hidden, method="logits")


def randomised(params):
  """Returns the tree with a random b, so that updates are nonzero."""

  def draw(path, x):
    if not re.search(wrap.TRAINABLE, path):
      return x
    seed = np.random.default_rng(len(path) + x.size)
    return jnp.asarray(0.3 * seed.standard_normal(x.shape), x.dtype)

  return tree.map_paths(draw, params)


def adapters(params):
  """Returns {address: LoRATensor}, whatever the runs."""
  out = {}
  for i, layer in enumerate(tree.layers(params)):
    for path, w in wrap.leaves(layer):
      if isinstance(w, AdaptedTensor):
        out[f"layers/{i}/{path}"] = w
  return out


@pytest.mark.slow
def test_all_linear_maps_of_all_layers():
  _, params = llama()
  got = adapt.Adapt(method=LoRA(rank=3))(params, KEY)
  want = {f"layers/{i}/{name}" for i in range(4) for name in LINEARS}
  assert set(adapters(got)) == want
  assert not isinstance(got["embed"], AdaptedTensor)
  assert not isinstance(got["head"], AdaptedTensor)


def test_trainable_parameters_of_the_main_job():
  model = presets.transformer(presets.FAMILIES["llama"], presets.SMOLLM2_135M)

  def adapted(key):
    start = model.init(key, jnp.zeros((1, 1), jnp.int32))
    return adapt.Adapt(method=LoRA(rank=8))(start["params"], key)

  selected, frozen = tree.partition(
    jax.eval_shape(adapted, KEY), wrap.TRAINABLE
  )
  assert tree.count(selected) == 2_442_240
  assert tree.count(frozen) == 134_515_008


@pytest.mark.parametrize(
  "targets, count",
  [
    (("q", "v"), 8),
    (("attention/q",), 4),
    (("embed",), 0),
    (r"layers/[02]/mlp/.*", 6),
    (r"layers/\d+/attention/[kv]|head", 8),
  ],
)
def test_targets(targets, count):
  _, params = llama()
  got = adapt.Adapt(targets=targets)(params, KEY)
  assert len(adapters(got)) == count
  for name in ("embed", "head"):
    assert isinstance(got[name], AdaptedTensor) == (name in str(targets))


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(targets=("q_proj",)), "'q_proj' matches no weight"),
    (dict(targets="q"), "'q' matches no weight"),
    (dict(targets="("), "not a regular expression"),
    (dict(rank_pattern={"w": 2}), "rank_pattern 'w' matches no weight"),
    (
      dict(rank_pattern={"q": 2, "layers/0/.*": 3}),
      "two keys of rank_pattern match layers/0/attention/q",
    ),
    (dict(alpha_pattern={"q": 2.0, "[qk]": 3.0}), "alpha_pattern match"),
  ],
)
def test_bad_configurations(options, message):
  with pytest.raises(UserError, match=message):
    adapting(**options)(llama()[1], KEY)


def test_new_adapters_are_bitwise_the_base():
  model, params = llama()
  for targets in (adapt.ALL_LINEAR, r".*"):
    got = adapt.Adapt(targets=targets)(params, KEY)
    chex.assert_trees_all_equal(logits(model, got), logits(model, params))


def test_initial_distributions():
  _, params = build(width=64, depth=8, hidden=96, vocab=50)
  drawn = adapters(adapt.Adapt(method=LoRA(rank=16))(params, KEY))
  a = np.stack(
    [drawn[f"layers/{i}/attention/q"].trained["a"] for i in range(8)]
  )
  bound = 64**-0.5
  assert abs(a).max() <= bound and abs(a).max() > 0.99 * bound
  # 8192 draws: the variance's own standard error is about 1 percent.
  np.testing.assert_allclose(a.var(), bound**2 / 3, rtol=0.05)
  normal = adapters(
    adapt.Adapt(method=LoRA(rank=16, init="gaussian"))(params, KEY)
  )
  a = np.stack([normal[f"layers/{i}/mlp/down"].trained["a"] for i in range(8)])
  np.testing.assert_allclose(a.std(), 1 / 16, rtol=0.05)
  assert all(not w.trained["b"].any() for w in drawn.values())
  assert all(
    w.trained["a"].dtype == w.trained["b"].dtype == jnp.float32
    for w in drawn.values()
  )
  embed = adapt.Adapt(targets=("embed",))(params, KEY)["embed"]
  assert not embed.trained["a"].any()
  np.testing.assert_allclose(np.std(embed.trained["b"]), 1.0, rtol=0.2)


@pytest.mark.slow
def test_every_weight_has_its_own_key_in_any_runs():
  _, params = gemma()
  scanned = adapters(adapt.Adapt()(params, KEY))
  unrolled = adapters(adapt.Adapt()(tree.unroll(params), KEY))
  chex.assert_trees_all_equal(
    {k: w.trained["a"] for k, w in scanned.items()},
    {k: w.trained["a"] for k, w in unrolled.items()},
  )
  some = [np.asarray(w.trained["a"])[0, :6].tobytes() for w in scanned.values()]
  assert len(set(some)) == len(some)
  other = adapters(adapt.Adapt()(params, jax.random.key(1)))
  assert all(
    (other[k].trained["a"] != w.trained["a"]).any() for k, w in scanned.items()
  )


def test_scales():
  _, params = llama()

  def scales(**options):
    drawn = adapters(adapting(rank=4, alpha=8.0, **options)(params, KEY))
    return {w.method.scale for w in drawn.values()}

  assert scales() == {2.0}
  assert scales(rslora=True) == {4.0}
  assert scales(alpha_pattern={"q": 2.0}) == {2.0, 0.5}
  assert scales(rank_pattern={"q": 2}) == {2.0, 4.0}


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, gemma])
@pytest.mark.sample(3)
def test_merged_equals_unmerged_also_where_runs_are_split(make):
  model, params = make()
  transform = adapt.Adapt(
    rank_pattern={"layers/1/attention/q": 2, "down": 4},
    alpha_pattern={"layers/[34]/mlp/up": 3.0},
    method=LoRA(rank=3),
  )
  got = randomised(transform(params, KEY))
  assert len(tree.runs(got)) > len(tree.runs(params))
  ranks = {k: w.trained["a"].shape[0] for k, w in adapters(got).items()}
  assert ranks["layers/1/attention/q"] == 2
  assert ranks["layers/2/mlp/down"] == 4
  assert ranks["layers/2/attention/q"] == 3
  unmerged = logits(model, got)
  assert abs(unmerged - logits(model, params)).max() > 0.1
  chex.assert_trees_all_close(
    unmerged, logits(model, wrap.merge(got)), atol=2e-5
  )


def test_disabled_is_the_base_itself():
  _, params = llama()
  got = wrap.disable(adapt.Adapt(targets=r".*")(params, KEY))
  chex.assert_trees_all_equal_structs(got, params)
  assert all(
    x is y
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True)
  )


def test_adapters_that_train_with_rounding_are_disabled():
  """DPO's reference is the rounded base, not the policy itself."""
  _, params = llama()
  rounded = qat.Prepare(format=Affine(block=2, symmetric=True))
  got = wrap.disable(rounded(adapt.Adapt()(params, KEY)))
  chex.assert_trees_all_equal(got, rounded(params))


@pytest.mark.parametrize(
  "around",
  [
    qat.Prepare(
      format=Affine(block=2, symmetric=True), targets=("gate", "up", "down")
    ),
    Inputs(op=Round(bits=8), targets="mlp/"),
  ],
  ids=["rounded", "rounds_inputs"],
)
def test_adapters_inside_other_weights_are_not_left_out(around):
  """The ones outside are not what was trained."""
  model, params = llama()
  inside = around(randomised(adapt.Adapt()(params, KEY)), KEY)
  refused = pytest.raises(UserError, match="mlp/.*: its adapter is inside a")
  for f in (
    lambda x: wrap.adapters(x, lambda adapter: adapter),
    lambda x: row_factors.extract(x, 8),
    lambda x: to_lora.to_lora(x, to_lora.Rank(2)),
    lambda x: merge.merge(x),
    lambda x: merge.merge_as(x, "requantized"),
  ):
    with refused:
      f(inside)
  merged = wrap.merge(inside)
  assert not any(map(wrap.has_adapter, dict(wrap.leaves(merged)).values()))
  chex.assert_trees_all_close(
    logits(model, merged), logits(model, inside), atol=1e-4
  )


def test_an_embedding_of_two_matrices_has_no_adapter():
  """Of a rotated tied model; merging would make the head the table."""
  model = support.model("llama", depth=1, tied=True)
  params = support.params(model)
  turned = rotate.Rotate(model=model, values=False, hidden=False)(params, KEY)
  with pytest.raises(UserError, match="embed: found a table and a head"):
    adapt.Adapt(targets=("embed",))(turned, KEY)
  untied, own = full_weights.untie(turned, model)
  chex.assert_trees_all_close(
    logits(own, untied), logits(model, turned), atol=1e-5
  )


def test_two_adapters_do_not_drop_the_same_inputs():
  x = jnp.ones((64, 32))
  inner = LoRA(rank=2, dropout=0.5)
  arrays = [{"a": jnp.ones((2, 32)), "b": jnp.ones((2, 32))}] * 2
  one = AdaptedTensor(jnp.zeros((32, 32)), arrays[0], method=inner)
  both = AdaptedTensor(one, arrays[1], method=inner).bind(key=KEY, ids=None)
  outer = dataclasses.replace(both, w=jnp.zeros((32, 32)))
  rows = [weights.einsum("td,df->tf", x, w)[:, 0] for w in (outer, both.w)]
  assert abs(np.corrcoef(rows)[0, 1]) < 0.6  # five standard errors of 64 rows


def test_two_adapters_on_one_weight_add_up():
  model, params = llama()
  first = randomised(
    adapt.Adapt(targets=("q",), method=LoRA(rank=2))(params, KEY)
  )
  both = randomised(
    adapt.Adapt(targets=("q",), method=LoRA(rank=3))(first, KEY)
  )
  merged = wrap.merge(both)
  chex.assert_trees_all_close(
    logits(model, both), logits(model, merged), atol=2e-5
  )
  chex.assert_trees_all_equal(wrap.disable(both), params)


def test_dropout_is_drawn_by_step_and_off_without_a_key():
  model, params = llama()
  got = randomised(adapt.Adapt(method=LoRA(dropout=0.5))(params, KEY))
  off = logits(model, got)
  plain = adapt.Adapt()(params, KEY)
  chex.assert_trees_all_equal(off, logits(model, randomised(plain)))
  one = logits(model, weights.bind(got, key=jax.random.key(1)))
  again = logits(model, weights.bind(got, key=jax.random.key(1)))
  two = logits(model, weights.bind(got, key=jax.random.key(2)))
  chex.assert_trees_all_equal(one, again)
  assert (one != two).any() and (one != off).any()
