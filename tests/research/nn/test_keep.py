"""Selecting tokens (`keep`): the same states, at lower cost."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode_attention.pages import empty_pages
from kernels_pallas.masks import Mask
from research import tree, weights
from research.lora import adapt
from research.lora.methods.alora import ALoRA
from research.lora.methods.ia3 import IA3
from research.nn import presets
from research.nn import time_embedding as clocks
from research.nn.attention_context import can_select_tokens
from research.nn.cache.paged import PagedLayer
from research.nn.moe.routing import Routing
from research.nn.transformer import init_cache
from tests import support

T, N = 12, 3
KEEP = jnp.array([[2, 9, 5], [11, 0, 4]])
VALID = jnp.arange(T) >= jnp.array([[0], [3]])


def masks():
  segments = jnp.where(VALID, 0, -1)
  return {
    "causal": None,
    "full": Mask.full(segments=segments),
    "blocks": Mask.block_causal(4, segments=segments),
    "prefix": Mask.prefix_lm(jnp.array([5, 3])),
  }


def positions():
  return jnp.where(VALID, jnp.cumsum(VALID, axis=-1) - 1, -1)


@functools.cache
def network(family="llama", **changes):
  """Returns a model and its layers, each in a run of its own."""
  model = support.model(family, **(dict(depth=2) | changes))
  return model, tree.unroll(support.params(model))


def same(got, want):
  # A few layers in fp32, whose sums may be taken in another order.
  scale = float(np.abs(np.asarray(want)).max())
  chex.assert_trees_all_close(got, want, atol=1e-5 * scale, rtol=0)


def kept(x, keep=KEEP):
  return jnp.take_along_axis(x, keep[..., None], axis=1)


def some_and_all(model, params, keep=KEEP, tokens=None, **how):
  """Returns states of selected tokens, computed alone and among all."""
  if tokens is None:
    tokens = support.tokens(2, T, model.vocab_size)

  @jax.jit
  def both():
    run = functools.partial(model.apply, {"params": params}, tokens, **how)
    return run(keep=keep)[0], kept(run()[0], keep)

  return both()


@pytest.mark.parametrize("kind", masks())
@pytest.mark.sample(3)
def test_states_are_those_of_all(kind):
  how = {"mask": masks()[kind]}
  if kind in ("full", "blocks"):
    how["positions"] = positions()
  keep = jnp.maximum(KEEP, jnp.array([[0], [3]]))  # what is no padding
  same(*some_and_all(*network(), keep=keep, **how))


@pytest.mark.slow
@pytest.mark.parametrize(
  "family", ["gemma2", pytest.param("qwen2", marks=pytest.mark.slow), "qwen3"]
)
def test_states_of_other_families_are(family):
  """Windows, post-norms and caps; biases; norms of queries."""
  same(*some_and_all(*network(family)))


@pytest.mark.slow
def test_experts_are_those_of_the_tokens_asked_for():
  sparse = presets.Sparse(routing=Routing(experts=4, active=2), hidden=12)
  same(*some_and_all(*network(sparse=sparse)))


@pytest.mark.parametrize(
  "by", [pytest.param("row", marks=pytest.mark.slow), "token"]
)
def test_times_are_those_of_the_tokens_asked_for(by):
  model, params = network(
    time_embedding=clocks.TimeEmbedding(width=8, features=8, hidden=8)
  )
  time = jnp.array([0.2, 0.9])
  if by == "token":
    time = jnp.linspace(0, 1, 2 * T).reshape(2, T)
  same(*some_and_all(model, params, time=time))


@pytest.mark.slow
def test_adapters_that_act_behind_a_call_know_where_they_are():
  """Keys and values are computed for all tokens, the rest for some."""
  model = support.model(width=16, head_dim=4, depth=2)
  params = adapt.Adapt(method=ALoRA(rank=2, invocation=(5,)))(
    tree.unroll(support.params(model)), jax.random.key(0)
  )
  params = jax.tree.map(
    lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params
  )
  tokens = support.tokens(2, T, model.vocab_size).at[:, 3].set(5)
  params = weights.with_tokens(params, tokens)
  same(*some_and_all(model, params, tokens=tokens))


def test_what_deeper_layers_add_is_that_of_all_tokens():
  """Nothing is added after the last layer, which has selected ones alone."""
  model, params = network()
  injected = 0.5 * jnp.cos(jnp.arange(2.0 * T * model.width))
  injected = injected.reshape(2, T, 1, model.width)
  same(*some_and_all(model, params, injected=injected))


def test_biases_that_an_adapter_scales_are_those_of_all_tokens():
  """(IA)^3 scales a whole output, so its bias as well."""
  model, base = network("qwen2", depth=1)
  adapted = adapt.Adapt(method=IA3(), targets=("q", "k", "v"))(
    base, jax.random.key(0)
  )
  params = tree.map_paths(
    lambda path, x: 1.5 * x if "/trained/" in path else x, adapted
  )
  got, want = some_and_all(model, params)
  same(got, want)
  attention = {
    k: 1.5 * v if k[0] in "qkv" else v
    for k, v in base["run0"]["layer0"]["attention"].items()
  }
  layer = {**base["run0"]["layer0"], "attention": attention}
  merged = {**base, "run0": {"layer0": layer}}
  same(got, some_and_all(model, merged)[0])


def test_adapters_on_queries_of_borrowed_keys_know_where_they_are():
  model = support.gemma4(
    vocab=32, kinds=("global", "global"), kv_shared_layers=1
  )
  params = adapt.Adapt(method=ALoRA(rank=2, invocation=(5,)), targets=("q",))(
    tree.unroll(support.params(model)), jax.random.key(0)
  )
  tokens = support.tokens(2, T, 32).at[:, 3].set(5)
  params = weights.with_tokens(params, tokens)
  same(*some_and_all(model, params, tokens=tokens))


def test_stacked_layers_give_the_same():
  model = support.model(depth=2)
  same(*some_and_all(model, support.params(model)))
  assert some_and_all(*network(), keep=jnp.tile(KEEP, 5))[0].shape[1] == 15


@pytest.mark.slow
@pytest.mark.parametrize(
  "family", [pytest.param("llama", marks=pytest.mark.slow), "gemma2"]
)
def test_a_cache_has_the_keys_of_all(family):
  """A prefill, then a piece, then a single token."""
  model, params = network(family)
  tokens = support.tokens(2, T, model.vocab_size)

  @functools.partial(jax.jit, static_argnames="few")
  def read(few):
    cache, out = init_cache(model, params, 2, T), []
    for start, stop, keep in (
      (0, 6, [[5], [2]]),
      (6, 11, [[4], [4]]),
      (11, 12, None),
    ):
      index = None if keep is None else jnp.array(keep)
      hidden, cache = model.apply(
        {"params": params},
        tokens[:, start:stop],
        cache=cache,
        keep=index if few else None,
      )
      whole = index is not None and not few
      out.append(kept(hidden, index) if whole else hidden)
    return out, cache

  (some, cache), (every, want) = read(few=True), read(few=False)
  for got, right in zip(some, every, strict=True):
    same(got, right)
  chex.assert_trees_all_close(cache, want, atol=1e-6)


def test_where_some_tokens_cannot_be_computed_alone():
  shape = 2, T, 8
  pages = PagedLayer(empty_pages(1, 2, 4, 8, "float32"), jnp.zeros((2, 1)))
  assert can_select_tokens(KEEP, Mask.causal(), None, shape, {})
  assert not can_select_tokens(None, Mask.causal(), None, shape, {})
  assert not can_select_tokens(KEEP, Mask.causal(), None, (2, N, 8), {})
  assert not can_select_tokens(
    KEEP, Mask.block_diffusion(T // 2, 3), None, shape, {}
  )
  assert not can_select_tokens(
    KEEP, Mask.causal(), {"layer0": pages}, shape, {}
  )


def test_the_last_layer_costs_less():
  """Keys and values for all tokens, everything else for one in six."""
  model, params = network()
  tokens = support.tokens(2, T, model.vocab_size)

  def flops(keep):
    run = jax.jit(lambda p: model.apply({"params": p}, tokens, keep=keep)[0])
    cost = run.lower(params).compile().cost_analysis()
    return cost["flops"]

  block = model.stack.blocks[0]
  a, width = block.attention, model.width
  per_token = 2 * width * (2 * a.heads * a.head_dim + 3 * block.mlp.hidden)
  saved = flops(None) - flops(KEEP[:, :2])
  assert saved >= per_token * 2 * (T - 2)
