"""Invariants of the Transformer, for all families."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kernels_pallas.masks import Mask
from research import tree
from research.nn import logits, presets
from research.nn.stack import Stack
from research.typing import UserError
from tests import support, support_numpy

# Two periods and a remainder, so that stacks have runs of both kinds.
MODELS = {
  "llama": support.model("llama"),
  "qwen2": support.model("qwen2", tied=True),
  "gemma2": support.model("gemma2", depth=5),
  "gemma3": support.model("gemma3", depth=8),
}
# Sums of up to width * depth products in another order.
CLOSE = dict(rtol=2e-5, atol=2e-5)


@pytest.fixture(scope="module", params=MODELS)
def case(request):
  model = MODELS[request.param]
  params, tokens = support.params(model), support.tokens()

  @jax.jit
  def loss(params, tokens):
    hidden, _ = model.apply({"params": params}, tokens)
    logits = model.apply({"params": params}, hidden, method="logits")
    return (logits**2).mean(), logits

  return model, params, tokens, loss


@pytest.mark.sample(4)
def test_scanned_equals_unrolled(case):
  _, params, tokens, loss = case
  unrolled = tree.unroll(params)
  assert len(tree.runs(unrolled)) > len(tree.runs(params))
  chex.assert_trees_all_close(
    loss(params, tokens)[1], loss(unrolled, tokens)[1], **CLOSE
  )


@pytest.mark.sample(3)
def test_layers_and_stack_are_inverse(case):
  model, params, _, _ = case
  again = tree.stack(
    tree.outer_params(params), list(tree.layers(params)), model.layer_kinds()
  )
  chex.assert_trees_all_equal(params, again)
  assert len(list(tree.layers(params))) == model.stack.depth


@pytest.mark.slow
@pytest.mark.parametrize(
  "family", [pytest.param("llama", marks=pytest.mark.slow), "gemma2"]
)
def test_remat_changes_nothing(family):
  model = support.model(family)
  params, tokens = support.params(model), support.tokens()

  def gradients(remat):
    again = model.clone(remat=remat)

    def loss(params):
      hidden, _ = again.apply({"params": params}, tokens)
      return (hidden**2).mean()

    return jax.jit(jax.value_and_grad(loss))(params)

  expected = gradients("none")
  for remat in ("layer", "names"):
    chex.assert_trees_all_close(expected, gradients(remat), **CLOSE)


@pytest.mark.sample(2)
def test_causal(case):
  _, params, tokens, loss = case
  changed = tokens.at[:, 10].add(1)
  before, after = loss(params, tokens)[1], loss(params, changed)[1]
  chex.assert_trees_all_close(before[:, :10], after[:, :10], **CLOSE)
  assert not np.allclose(before[:, 10:], after[:, 10:])


@pytest.mark.slow
@pytest.mark.sample(2)
def test_compiles_once_a_shape(case):
  model, params, tokens, _ = case
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=2)
  def hidden(params, tokens):
    return model.apply({"params": params}, tokens)[0]

  for shape in ((2, 16), (2, 16), (1, 8), (2, 16), (1, 8)):
    hidden(params, tokens[: shape[0], : shape[1]])


def test_window_is_shorter_than_the_text():
  model = support.model("mistral")  # looks back on 6 tokens, in 3 layers
  params, tokens = support.params(model), support.tokens(1, 24)
  hidden = jax.jit(lambda t: model.apply({"params": params}, t)[0])
  before, after = hidden(tokens), hidden(tokens.at[0, 0].add(1))
  reach = 3 * 5
  assert not np.allclose(before[0, reach], after[0, reach], atol=1e-6)
  chex.assert_trees_all_equal(before[0, reach + 1 :], after[0, reach + 1 :])


@pytest.mark.parametrize(
  ("given", "alone"),
  [
    (Mask.full((None, 0)), (5, None)),
    (Mask.causal((2, None)), (2, None)),
    (Mask.full((2, 0)), (2, None)),
    (Mask.full((8, 3)), (5, 3)),
  ],
)
def test_a_layer_sees_what_both_its_window_and_the_mask_let_it(given, alone):
  model = support.model("gemma2", depth=1)
  block = model.stack.blocks[0]
  assert block.attention.window == 6
  free = block.clone(attention=block.attention.clone(window=None))
  free = model.clone(stack=dataclasses.replace(model.stack, blocks=(free,)))
  ahead = alone[1] is not None
  mask = Mask.full(alone) if ahead else Mask.causal(alone)
  params, tokens = support.params(model), support.tokens(length=12)
  got, want = (
    net.apply({"params": params}, tokens, mask=mask)[0]
    for net, mask in ((model, given), (free, mask))
  )
  chex.assert_trees_all_close(got, want, atol=1e-5)


def test_full_mask_sees_both_ways():
  model = support.model("llama")
  params, tokens = support.params(model), support.tokens()
  hidden = jax.jit(
    lambda t: model.apply({"params": params}, t, mask=Mask.full())[0]
  )
  before, after = hidden(tokens), hidden(tokens.at[:, -1].add(1))
  assert not np.allclose(before[:, 0], after[:, 0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen(side):
  model = support.model("gemma2")
  params, tokens = support.params(model), support.tokens(1, 11)
  pad = (0, 5) if side == "right" else (5, 0)
  padded = jnp.pad(tokens, ((0, 0), pad), constant_values=3)
  positions = jnp.pad(jnp.arange(11)[None], ((0, 0), pad), constant_values=-1)
  apply = jax.jit(
    lambda t, p=None: model.apply({"params": params}, t, positions=p)[0]
  )
  alone, inside = apply(tokens), apply(padded, positions)
  chex.assert_trees_all_close(alone, inside[:, pad[0] : pad[0] + 11], **CLOSE)


def test_wrong_number_of_layers_is_said():
  model = support.model("llama")
  params = support.params(model)
  deeper = model.clone(stack=dataclasses.replace(model.stack, depth=4))
  with pytest.raises(UserError, match="hold 3 layers, the model has 4"):
    deeper.apply({"params": params}, support.tokens())


def test_a_run_of_unlike_layers_is_said():
  sizes = dataclasses.replace(support.SIZES, depth=4)
  alike = presets.transformer(presets.FAMILIES["llama"], sizes)
  mixed = presets.transformer(presets.FAMILIES["gemma2"], sizes)
  mixed = alike.clone(stack=Stack(4, mixed.stack.blocks))
  with pytest.raises(UserError, match="different kinds"):
    mixed.stack.runs(support.params(alike))


@pytest.mark.parametrize("family", presets.FAMILIES)
def test_modules_are_values(family):
  def build():
    return presets.transformer(presets.FAMILIES[family], support.SIZES)

  a, b = build(), build()
  assert a == b and hash(a) == hash(b) and a is not b
  assert a != b.clone(dtype="bfloat16")

  def arrays(value):
    if isinstance(value, nn.Module | Stack):
      fields = [f.name for f in dataclasses.fields(value)]
      return any(arrays(getattr(value, f)) for f in fields if f != "parent")
    if isinstance(value, tuple):
      return any(map(arrays, value))
    return hasattr(value, "dtype") and hasattr(value, "shape")

  assert not arrays(a)
  with pytest.raises(dataclasses.FrozenInstanceError):
    a.stack.depth = 2


def test_apply_has_no_side_effects():
  model = support.model("llama")
  params, tokens = support.params(model), support.tokens()
  before = jax.tree.map(np.array, params)
  one = model.apply({"params": params}, tokens)
  two = model.apply({"params": params}, tokens)
  chex.assert_trees_all_equal(one, two)
  chex.assert_trees_all_equal(before, params)


def test_embeddings_as_input():
  model = support.model("llama")
  params, tokens = support.params(model), support.tokens()
  by_ids = model.apply({"params": params}, tokens)[0]
  by_rows = model.apply({"params": params}, params["embed"][tokens])[0]
  chex.assert_trees_all_equal(by_ids, by_rows)


@pytest.mark.parametrize("kind", ["causal", "full"])
def test_logits_are_those_of_the_definition(kind):
  """In NumPy, float64: of tokens that are no array of JAX as well."""
  model = support.model()
  params, tokens = support.params(model), np.asarray(support.tokens(1, 12))
  table = np.ones((1, 12, 12), bool)
  mask = Mask.full()
  if kind == "causal":
    table, mask = np.tril(table), None
  found = logits(model, params, tokens, mask=mask)
  place = np.arange(12)[None]
  expected = support_numpy.logits(model, params, tokens, place, table)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
