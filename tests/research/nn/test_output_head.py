"""Last feed-forward inside the loss: the same loss and gradients."""

import chex
import jax
import jax.numpy as jnp
import pytest

from research import tree, weights
from research.diffusion.block import BlockDiffusion
from research.diffusion.objective import MaskedDiffusion
from research.lora import adapt
from research.lora.methods.alora import ALoRA
from research.lora.methods.lora import LoRA
from research.nn import output_head, presets
from research.nn import time_embedding as clocks
from research.nn.moe.routing import Routing
from research.typing import UserError
from tests import support

T = 12


def batch(model):
  tokens = support.tokens(2, T, model.vocab_size - 1)
  place = jnp.broadcast_to(jnp.arange(T), (2, T))
  return dict(
    tokens=tokens,
    targets=jnp.roll(tokens, -1, axis=1),
    weights=jnp.ones((2, T)),
    positions=place,
    segments=jnp.zeros((2, T), jnp.int32),
  )


@pytest.mark.parametrize("name", ["head", "embed"])
def test_a_loss_gets_the_head_alone(name):
  """It accumulates a gradient of all that it gets, `V D` floats each."""
  model = support.model("llama" if name == "head" else "gemma2", depth=1)
  params = support.params(model)
  hidden = jax.random.normal(jax.random.key(0), (2, T, model.width))
  got = output_head.logits(model, output_head.head_of(params), hidden)
  want = model.apply({"params": params}, hidden, method="logits")
  assert list(output_head.head_of(params)) == [name]
  chex.assert_trees_all_equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("family", "kind"),
  [
    ("llama", BlockDiffusion),
    ("gemma2", MaskedDiffusion),
    ("llama", MaskedDiffusion),
    ("gemma2", BlockDiffusion),
  ],
)
def test_losses_and_gradients_are_the_same(kind, family):
  """For stacked layers, and for a split last layer with a deferred MLP."""
  model = support.model(family, depth=2)
  more = {"block": 4} if kind is BlockDiffusion else {}
  # Chunks of which some hold no masked token.
  objective = kind(model=model, mask_id=model.vocab_size - 1, rows=4, **more)
  params, rows, key = support.params(model), batch(model), jax.random.key(3)

  @jax.jit
  def step(params):
    def loss(params):
      return objective(params, rows, key)[0]

    return jax.value_and_grad(loss)(params)

  want, grads = step(params)
  apart = tree.split_last_layer(params)
  assert output_head.head_inputs(model, apart, rows["tokens"])[1].keys() >= {
    "run1"
  }
  got, found = step(apart)
  assert float(got) == pytest.approx(float(want), rel=1e-5)
  found = tree.stack(tree.outer_params(found), list(tree.layers(found)))
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads))
  chex.assert_trees_all_close(
    tree.unroll(found), tree.unroll(grads), atol=1e-5 * scale
  )


def waits(model, params, **time) -> bool:
  """Whether the feed-forward is deferred; checks the result."""
  tokens = support.tokens(2, T, model.vocab_size)
  params = weights.with_tokens(params, tokens)

  @jax.jit
  def both():
    states, some = output_head.head_inputs(model, params, tokens, **time)
    hidden, _ = model.apply({"params": params}, tokens, **time)
    want = model.apply({"params": params}, hidden, method="logits")
    return output_head.logits(model, some, states), want, some

  got, want, some = both()
  scale = float(jnp.abs(want).max())
  chex.assert_trees_all_close(got, want, atol=1e-5 * scale)
  return bool(tree.runs(some))


def adapted(model, method):
  params = tree.split_last_layer(support.params(model))
  return adapt.Adapt(method=method)(params, jax.random.key(0))


@pytest.mark.slow
def test_it_waits_where_it_sees_tokens_alone():
  plain = support.model(depth=2)
  apart = tree.split_last_layer(support.params(plain))
  assert waits(plain, apart)
  assert not waits(plain, support.params(plain))
  assert waits(plain, adapted(plain, LoRA(rank=2)))
  assert not waits(plain, adapted(plain, ALoRA(rank=2, invocation=(5,))))
  dropped = weights.bind(
    adapted(plain, LoRA(rank=2, dropout=0.5)), key=jax.random.key(1)
  )
  assert not tree.runs(
    output_head.head_inputs(plain, dropped, support.tokens(2, T))[1]
  )


def test_it_does_not_wait_with_experts_or_times():
  sparse = presets.Sparse(routing=Routing(experts=4, active=2), hidden=12)
  model = support.model(sparse=sparse, depth=1)
  assert not waits(model, support.params(model))
  model = support.model(
    time_embedding=clocks.TimeEmbedding(width=8, features=8, hidden=8), depth=1
  )
  assert not waits(model, support.params(model), time=jnp.array([0.2, 0.9]))


def test_a_scanned_layer_has_no_feed_forward_of_its_own():
  model = support.model(depth=2)
  with pytest.raises(UserError, match="tree.split_last_layer"):
    model.apply(
      {"params": support.params(model)},
      support.tokens(1, 4),
      method="before_feed_forward",
    )
