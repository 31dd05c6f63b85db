"""Sorted experts against a dense loop; MoE Transformers."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree, weights
from research.interop import peft
from research.interop.gguf import tensor_types
from research.lora import adapt, wrap
from research.lora.methods.hira import HiRA
from research.lora.methods.lora import LoRA
from research.nn import presets
from research.nn.mlp import Mlp
from research.nn.moe import Moe
from research.nn.moe import routing as routings
from research.nn.moe.mixture import sort_by_expert
from research.nn.moe.routing import Routing
from research.nn.transformer import init_cache
from research.quant.formats import ggml
from research.typing import UserError
from tests import support

GROUPED = Routing(
  experts=6,
  active=2,
  score="sigmoid",
  scale=2.5,
  biased=True,
  groups=3,
  active_groups=2,
  group_score="top2",
)
MODULES = {
  "mixtral": Moe(routing=Routing(experts=5, active=2), hidden=24),
  "deepseek": Moe(routing=GROUPED, hidden=24, shared=Mlp(hidden=48)),
  # Switch: a weight normalised alone would be 1 and teach the router nothing.
  "one": Moe(routing=Routing(experts=5, active=1, normalised=False), hidden=24),
}
# Sums of up to 48 products of numbers near 1, in another order.
CLOSE = dict(rtol=2e-5, atol=2e-5)
B, T, D = 3, 11, 16


def drawn(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(0.4 * rng.standard_normal(x.shape), jnp.float32),
    shapes,
  )


def params_of(module):
  x = jnp.zeros((1, 1, D))
  return drawn(jax.eval_shape(module.init, jax.random.key(0), x)["params"])


def inputs(seed=1):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def applied(module, params, x, real=None):
  return module.apply({"params": params}, x, real)


@functools.partial(jax.jit, static_argnums=0)
def dense_loop(module, params, x):
  """Returns every token through every expert, weighed by 0 where not chosen."""
  flat = x.reshape(-1, D)
  bias = params.get("router_bias")
  ids, shares = routings.select_experts(
    module.routing, flat @ params["router"], bias
  )
  y = jnp.zeros_like(flat)
  for e in range(module.routing.experts):
    w = {k: v[e] for k, v in params["experts"].items()}
    one = jax.nn.silu(flat @ w["gate"]) * (flat @ w["up"]) @ w["down"]
    y += one * jnp.where(ids == e, shares, 0).sum(-1, keepdims=True)
  if module.shared is not None:
    w = params["shared"]
    y += jax.nn.silu(flat @ w["gate"]) * (flat @ w["up"]) @ w["down"]
  return y.reshape(x.shape)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.sample(3)
def test_equals_a_dense_loop_with_all_gradients(name):
  module = MODULES[name]
  params, x = params_of(module), inputs()
  seen = jnp.asarray(
    np.random.default_rng(2).standard_normal(x.shape), jnp.float32
  )

  def loss(f):
    return jax.jit(
      jax.value_and_grad(lambda p, x: (f(p, x) * seen).sum(), argnums=(0, 1))
    )

  got = loss(lambda p, x: applied(module, p, x)[0])(params, x)
  want = loss(lambda p, x: dense_loop(module, p, x))(params, x)
  # Sums over B * T rows of such sums.
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)
  slopes = got[1][0]
  slopes.pop("router_bias", None)
  assert all(jnp.abs(g).max() > 1e-3 for g in jax.tree.leaves(slopes))


def test_rows_sorted_by_expert():
  ids = jnp.asarray(np.random.default_rng(0).integers(0, 7, (9, 2)))
  order, inverse, sizes = sort_by_expert(ids, 7)
  flat = np.asarray(ids).reshape(-1)
  np.testing.assert_array_equal(flat[order], np.sort(flat))
  np.testing.assert_array_equal(np.asarray(order)[inverse], np.arange(18))
  np.testing.assert_array_equal(sizes, np.bincount(flat, minlength=7))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.sample(3)
def test_tokens_do_not_depend_on_their_company(name):
  module = MODULES[name]
  params, x = params_of(module), inputs()
  run = jax.jit(functools.partial(applied, module))
  y, load = run(params, x)
  places = np.random.default_rng(3).permutation(B * T)
  mixed = x.reshape(-1, D)[places].reshape(x.shape)
  z, same = run(params, mixed)
  chex.assert_trees_all_close(
    z.reshape(-1, D), y.reshape(-1, D)[places], **CLOSE
  )
  chex.assert_trees_all_close(load, same, rtol=1e-5)
  other = run(params, x.at[1:].set(inputs(7)[1:]))[0]
  chex.assert_trees_all_close(other[0], y[0], **CLOSE)
  alone = applied(module, params, x[:1, :1])[0]
  chex.assert_trees_all_close(alone, y[:1, :1], **CLOSE)


def test_no_token_is_dropped_where_all_want_one_expert():
  module = MODULES["one"]
  params, x = params_of(module), jnp.abs(inputs())
  router = jnp.zeros_like(params["router"]).at[:, 3].set(1.0)
  params = params | {"router": router}
  y, load = applied(module, params, x)
  np.testing.assert_array_equal(load.counts, [0, 0, 0, B * T, 0])
  chex.assert_trees_all_close(y, dense_loop(module, params, x), **CLOSE)


def test_padding_does_not_count():
  module = MODULES["deepseek"]
  params, x = params_of(module), inputs()
  real = jnp.arange(T)[None] < jnp.asarray([11, 4, 0])[:, None]
  load = applied(module, params, x, real)[1]
  changed = jnp.where(real[..., None], x, 7.0)
  chex.assert_trees_all_equal(load, applied(module, params, changed, real)[1])
  assert load.tokens == 15 and load.counts.sum() == 30


def test_the_router_computes_in_fp32():
  """In bf16 several of these choices would differ."""
  module = Moe(routing=Routing(experts=64, active=4), hidden=2)
  params = params_of(module)
  x = inputs().astype(jnp.bfloat16)
  y, load = applied(module, params, x)
  assert y.dtype == jnp.bfloat16
  wide = np.asarray(x, np.float32).reshape(-1, D) @ np.asarray(params["router"])
  counts = np.zeros(64)
  for row in wide:
    counts[np.argsort(-row)[:4]] += 1
  np.testing.assert_array_equal(load.counts, counts)


def test_initial_experts_have_the_fan_in_of_one():
  module = Moe(routing=Routing(experts=16, active=2), hidden=64)
  x = jnp.zeros((1, 1, 64))
  params = jax.jit(module.init)(jax.random.key(0), x)["params"]["experts"]
  for w in params.values():
    # 64 * 64 numbers: the deviation is known to about 1/90.
    deviations = np.asarray(w).std(axis=(1, 2)) * 8
    np.testing.assert_allclose(deviations, 1, atol=0.06)
  assert len(np.unique(np.asarray(params["up"])[:, 0, 0])) == 16


SPARSE = presets.Sparse(
  routing=Routing(experts=5, active=2), hidden=20, shared=1, dense=(0,)
)
MODEL = support.model("qwen3_moe", sparse=SPARSE, rotated=0.5)


@functools.cache
def base():
  return support.params(MODEL)


@functools.partial(jax.jit, static_argnums=0)
def outputs(model, params, tokens, positions=None):
  return model.apply(
    {"params": params}, tokens, positions, method="with_router_loads"
  )


def test_a_dense_first_layer_is_a_run_of_its_own():
  assert tree.runs(base()) == ["run0", "run1"]
  assert tree.run_length(base()["run1"]) == 2
  assert "experts" not in base()["run0"]["layer0"]["mlp"]
  assert base()["run1"]["layer0"]["mlp"]["experts"]["up"].shape == (
    2,
    5,
    32,
    20,
  )
  again = tree.stack(
    tree.outer_params(base()), list(tree.layers(base())), MODEL.layer_kinds()
  )
  chex.assert_trees_all_equal(again, base())


@pytest.mark.slow
def test_loads_come_beside_the_same_output():
  tokens = support.tokens()
  hidden, cache, loads = outputs(MODEL, base(), tokens)
  plain = jax.jit(lambda p, t: MODEL.apply({"params": p}, t))(base(), tokens)
  chex.assert_trees_all_equal((hidden, cache), plain)
  assert loads["run0"]["layer0"] is None
  (load,) = routings.find_loads(loads)
  np.testing.assert_array_equal(load.tokens, [32, 32])
  np.testing.assert_array_equal(load.counts.sum(-1), [64, 64])
  assert routings.balance_loss(load).shape == (2,)


def test_padded_rows_do_not_count():
  tokens = support.tokens()
  positions = jnp.broadcast_to(jnp.arange(16), (2, 16))
  short = jnp.where(positions < jnp.asarray([[16], [5]]), positions, -1)
  hidden, _, loads = outputs(MODEL, base(), tokens, short)
  (load,) = routings.find_loads(loads)
  np.testing.assert_array_equal(load.tokens, [21, 21])
  changed = jnp.where(short < 0, 3, tokens)
  again, _, same = outputs(MODEL, base(), changed, short)
  chex.assert_trees_all_close(hidden[1, :5], again[1, :5], **CLOSE)
  chex.assert_trees_all_close(loads, same, rtol=1e-5)


@pytest.mark.slow
def test_scanned_equals_unrolled():
  tokens = support.tokens()
  one = outputs(MODEL, base(), tokens)[0]
  two = outputs(MODEL, tree.unroll(base()), tokens)[0]
  chex.assert_trees_all_close(one, two, **CLOSE)


@pytest.mark.slow
def test_decoding_with_a_cache_equals_the_full_pass():
  tokens = support.tokens(2, 12)
  want = outputs(MODEL, base(), tokens)[0]

  @jax.jit
  def step(tokens, cache):
    return MODEL.apply({"params": base()}, tokens, cache=cache)

  cache = init_cache(MODEL, base(), batch=2, capacity=16)
  found, cache = step(tokens[:, :7], cache)
  parts = [found]
  for i in range(7, 12):
    found, cache = step(tokens[:, i : i + 1], cache)
    parts.append(found)
  chex.assert_trees_all_close(jnp.concatenate(parts, 1), want, **CLOSE)


@pytest.mark.slow
def test_remat_changes_nothing_not_even_through_the_balance_loss():
  tokens = support.tokens()

  def gradients(remat):
    def loss(params):
      hidden, _, loads = outputs.__wrapped__(
        MODEL.clone(remat=remat), params, tokens
      )
      (load,) = routings.find_loads(loads)
      extra = routings.balance_loss(load) + 0.1 * routings.z_loss(load)
      return (hidden**2).mean() + extra.sum()

    return jax.jit(jax.value_and_grad(loss))(base())

  expected = gradients("none")
  router = expected[1]["run1"]["layer0"]["mlp"]["router"]
  assert jnp.abs(router).max() > 1e-3
  for remat in ("layer", "names"):
    chex.assert_trees_all_close(expected, gradients(remat), **CLOSE)


EXPERTS = ("router", "experts/gate", "experts/up", "experts/down")


@pytest.mark.slow
def test_a_fresh_adapter_on_experts_changes_no_bit():
  tokens = support.tokens()
  adapted = adapt.Adapt(targets=EXPERTS, method=LoRA(rank=3))(
    base(), jax.random.key(0)
  )
  a = adapted["run1"]["layer0"]["mlp"]["experts"]["down"].trained["a"]
  assert a.shape == (2, 5, 3, 20)
  assert len(np.unique(np.asarray(a)[..., 0, 0])) == 10
  chex.assert_trees_all_equal(
    outputs(MODEL, adapted, tokens)[0], outputs(MODEL, base(), tokens)[0]
  )


@pytest.mark.slow
def test_merged_adapters_on_experts_compute_the_same():
  tokens = support.tokens()
  spec = adapt.Adapt(targets=EXPERTS, method=LoRA(rank=3))(
    base(), jax.random.key(0)
  )
  factors, frozen = tree.partition(spec, wrap.TRAINABLE)
  factors = drawn(factors, seed=4)
  adapted = tree.combine(factors, frozen)
  got = outputs(MODEL, adapted, tokens)[0]
  want = outputs(MODEL, wrap.merge(adapted), tokens)[0]
  # Sums through three layers, the updates as large as the weights.
  chex.assert_trees_all_close(got, want, rtol=2e-4, atol=2e-4)
  assert jnp.abs(got - outputs(MODEL, base(), tokens)[0]).max() > 0.1


@pytest.mark.slow
def test_dropout_reaches_the_experts_adapters():
  tokens = support.tokens()
  spec = adapt.Adapt(targets=EXPERTS, method=LoRA(rank=3, dropout=0.5))
  adapted = spec(base(), jax.random.key(0))
  factors, frozen = tree.partition(adapted, wrap.TRAINABLE)
  adapted = tree.combine(drawn(factors), frozen)
  one, two = (
    outputs(MODEL, weights.bind(adapted, key=jax.random.key(k)), tokens)[0]
    for k in (1, 2)
  )
  assert jnp.abs(one - two).max() > 1e-3


def test_all_linear_leaves_router_and_experts_alone():
  chosen = adapt.Adapt().methods(base())
  assert not [p for p in chosen if "router" in p or "experts" in p]
  assert {"layers/1/mlp/shared/up", "layers/0/mlp/up"} <= set(chosen)


@pytest.mark.slow
def test_pefts_files_hold_adapters_beside_experts_and_loras_on_them(tmp_path):
  model = support.model(
    "qwen3_moe", sparse=dataclasses.replace(SPARSE, shared=0)
  )
  plain = support.params(model)
  adapted = adapt.Adapt(method=LoRA(rank=2))(plain, jax.random.key(0))
  factors, frozen = tree.partition(adapted, wrap.TRAINABLE)
  adapted = tree.combine(drawn(factors), frozen)
  peft.save_adapter(tmp_path / "a", adapted, model, "base")
  again = peft.load_adapter(tmp_path / "a", plain, model)
  chex.assert_trees_all_equal(again, adapted)
  # Of LoRA alone: `peft/test_experts` has what is written of it.
  adapt_up = functools.partial(adapt.Adapt, targets=("experts/up",))
  on_experts = adapt_up(method=LoRA(rank=2))(plain, jax.random.key(0))
  factors, frozen = tree.partition(on_experts, wrap.TRAINABLE)
  on_experts = tree.combine(drawn(factors), frozen)
  peft.save_adapter(tmp_path / "b", on_experts, model, "base")
  peft.load_adapter(tmp_path / "b", plain, model)
  other = adapt_up(method=HiRA(rank=2))(plain, jax.random.key(0))
  with pytest.raises(UserError, match="stacked experts PEFT has plain LoRA"):
    peft.save_adapter(tmp_path / "c", other, model, "base")


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
@pytest.mark.sample(2)
def test_packed_experts_compute_what_they_decode_to(kind):
  module = Moe(routing=Routing(experts=4, active=2), hidden=32)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((2, 9, 64)), jnp.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
  plain = drawn(shapes)

  def packed(w):
    stored = np.asarray(w, np.float32).transpose(0, 2, 1)  # rows of [out, in]
    raw = [
      tensor_types.encode(kind, m).reshape(len(m), -1)
      for m in np.ascontiguousarray(stored)
    ]
    return ggml.from_ggml(kind, raw, -2)

  params = plain | {"experts": jax.tree.map(packed, plain["experts"])}
  decoded = plain | {
    "experts": jax.tree.map(
      jax.jit(weights.dense), params["experts"], is_leaf=weights.is_weight
    )
  }

  @jax.jit
  def both(params):
    def loss(x):
      y = applied(module, params, x)[0]
      return (y**2).sum(), y

    slope, y = jax.grad(loss, has_aux=True)(x)
    return y, slope

  (y, slope), (expected, slopes) = both(params), both(decoded)
  chex.assert_trees_all_close(y, expected, **CLOSE)
  chex.assert_trees_all_close(slope, slopes, rtol=1e-4, atol=1e-4)
