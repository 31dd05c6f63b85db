"""`layers.run_layers`: taps, injections and stops, layer by layer."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kernels_pallas.masks import Mask
from research import tree
from research.nn import layers
from research.nn.attention import CrossAttention
from research.nn.mlp import PlainMlp
from research.nn.norm import LayerNorm
from research.typing import UserError
from tests import support

# Three layers of two kinds: a run of one period of two, and one of one layer.
MODEL = support.model("gemma2", depth=3)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 32)), jnp.float32)
POSITIONS = jnp.broadcast_to(jnp.arange(5), (2, 5))
# Sums over the width and over the layers, in another order.
CLOSE = dict(rtol=2e-5, atol=2e-5)


def apply(block, params, x):
  rope = block.attention.rope.tables(POSITIONS, block.attention.head_dim)
  args = x, POSITIONS, Mask.causal(), rope
  return block.apply({"params": params}, *args)[0]


def run(params, x, **options):
  runs = [
    (params[name], blocks) for name, _, blocks in MODEL.stack.runs(params)
  ]

  def layer(block, own, x, state, last):
    del last
    return apply(block, own, x), state

  return layers.run_layers(runs, x, layer, **options)


def one_by_one(params, x, injected=None):
  """Returns the residual stream after each layer."""
  out = []
  kinds = MODEL.layer_kinds()
  for i, (block, own) in enumerate(
    zip(kinds, tree.layers(params), strict=True)
  ):
    x = apply(block, own, x)
    if injected is not None and i < injected.shape[2]:
      x = x + injected[:, :, i]
    out.append(x)
  return out


@pytest.fixture(scope="module")
def params():
  return support.params(MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "layer"])
def test_taps_are_the_layers_outputs(params, remat):
  expected = one_by_one(params, X)
  y, _, watched = jax.jit(lambda p, x: run(p, x, taps=(0, 1), remat=remat))(
    params, X
  )
  chex.assert_trees_all_close([*watched, y], expected, **CLOSE)


def test_injected_activations_come_after_the_first_layers(params):
  injected = jnp.asarray(
    np.random.default_rng(1).normal(size=(2, 5, 2, 32)), jnp.float32
  )
  expected = one_by_one(params, X, injected)[-1]
  y, _, _ = jax.jit(lambda p, x: run(p, x, injected=injected))(params, X)
  chex.assert_trees_all_close(y, expected, **CLOSE)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_stops_after_some_layers(params, stop):
  expected = one_by_one(params, X)[stop - 1]
  y, _, _ = run(params, X, stop=stop)
  chex.assert_trees_all_close(y, expected, **CLOSE)


def test_layers_that_are_not_there_are_refused(params):
  with pytest.raises(UserError, match="found layer 3, expected one of 0 to 2"):
    run(params, X, taps=(3,))
  with pytest.raises(UserError, match="expected fewer than 3"):
    run(params, X, injected=jnp.zeros((2, 5, 3, 32)))


def test_layer_norm_is_flax_s():
  rng = np.random.default_rng(2)
  own = {
    k: jnp.asarray(rng.normal(size=32), jnp.float32) for k in ("scale", "bias")
  }
  y = LayerNorm(eps=1e-5).apply({"params": own}, X)
  expected = nn.LayerNorm(epsilon=1e-5).apply({"params": own}, X)
  chex.assert_trees_all_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu_tanh"])
def test_plain_mlp_is_its_formula(activation):
  mlp = PlainMlp(hidden=7, activation=activation)
  own = mlp.init(jax.random.key(0), X)["params"]
  own = jax.tree.map(lambda w: w + 0.1, own)
  up, down = np.asarray(own["up"]), np.asarray(own["down"])
  h = np.asarray(X) @ up + np.asarray(own["up_bias"])
  if activation == "quick_gelu":
    h = h / (1 + np.exp(-1.702 * h))
  else:
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
  expected = h @ down + np.asarray(own["down_bias"])
  chex.assert_trees_all_close(
    mlp.apply({"params": own}, X), expected, rtol=1e-4, atol=1e-4
  )


def test_cross_attention_is_flax_s():
  memory = X[:, :3, :24]
  module = CrossAttention(heads=4, head_dim=8, qkv_bias=True, out_bias=True)
  own = module.init(jax.random.key(0), X, memory)["params"]
  own = jax.tree.map(lambda w: w + 0.05, own)
  theirs = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=32)
  names = {"q": "query", "k": "key", "v": "value"}
  other = {
    theirs: {
      "kernel": own[ours].reshape(-1, 4, 8),
      "bias": own[f"{ours}_bias"].reshape(4, 8),
    }
    for ours, theirs in names.items()
  }
  other["out"] = {"kernel": own["o"].reshape(4, 8, 32), "bias": own["o_bias"]}
  expected = theirs.apply({"params": other}, X, memory)
  chex.assert_trees_all_close(
    module.apply({"params": own}, X, memory), expected, rtol=1e-5, atol=1e-5
  )


def test_queries_share_keys_of_another_sequence_in_groups():
  memory = X[:, :3, :24]
  full = CrossAttention(heads=4, head_dim=8, qkv_bias=True)
  own = full.clone(kv_heads=2).init(jax.random.key(0), X, memory)["params"]

  def repeated(name):
    w = own[name].reshape(*own[name].shape[:-1], 2, 8)
    return jnp.repeat(w, 2, axis=-2).reshape(*w.shape[:-2], 32)

  names = ("k", "v", "k_bias", "v_bias")
  want = full.apply(
    {"params": own | {x: repeated(x) for x in names}}, X, memory
  )
  got = full.clone(kv_heads=2).apply({"params": own}, X, memory)
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)
