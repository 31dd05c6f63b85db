"""What methods start from is what the model's own activations say."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree
from research.lora import adapt, looks, wrap
from research.lora.methods.eva import EVA
from research.lora.methods.residual import CorDA, LoRAGA
from tests import support

KEY = jax.random.key(0)


@pytest.fixture(scope="module", name="case")
def _case():
  """A model, a loss of it, and the addresses of its matrices."""
  model = support.model(width=32, head_dim=8)
  params, tokens = support.params(model), support.tokens()

  def loss(params):
    return jnp.mean(jnp.tanh(model.apply({"params": params}, tokens)[0]))

  names = [n for n in wrap.matrices(params) if n.startswith("layers/")]
  return model, params, tokens, loss, names


def test_moments_are_those_of_the_inputs(case):
  """The first layer's queries see normalised embeddings, by hand."""
  _, params, tokens, loss, names = case
  found = looks.Covariances(loss=loss)(params, names, KEY)
  assert set(found) == set(names)
  x = np.asarray(params["embed"], np.float64)[np.asarray(tokens).ravel()]
  x /= np.sqrt(np.mean(x**2, 1, keepdims=True) + 1e-5)
  scale = params["run0"]["layer0"]["attention_norm"]["scale"][0]
  x *= np.asarray(scale, np.float64)
  want = x.T @ x
  want *= len(want) / np.trace(want)
  np.testing.assert_allclose(
    found["layers/0/attention/q"], want, atol=1e-5 * np.abs(want).max()
  )
  same = found["layers/0/attention/k"]
  chex.assert_trees_all_equal(found["layers/0/attention/q"], same)


def test_moments_do_not_depend_on_how_layers_are_stored(case):
  _, params, _, loss, names = case
  scanned = looks.Covariances(loss=loss)(params, names, KEY)
  unrolled = looks.Covariances(loss=loss)(tree.unroll(params), names, KEY)
  chex.assert_trees_all_close(scanned, unrolled, atol=1e-4)


def test_directions_explain_the_most(case):
  _, params, _, loss, names = case
  moments = looks.Covariances(loss=loss)(params, names, KEY)
  found = looks.Directions(loss=loss, rank=3)(params, names, KEY)
  for name in names:
    v = found[name]
    np.testing.assert_allclose(v @ v.T, np.eye(3), atol=1e-5)
    explained = np.einsum("ri,ij,rj->r", v, moments[name], v)
    want = np.linalg.eigvalsh(moments[name])[::-1][:3]
    np.testing.assert_allclose(explained, want, rtol=1e-3)


def test_gradients_are_the_losses(case):
  """The start of LoRA-GA, one step along it, and a finite difference."""
  _, params, _, loss, names = case
  found = looks.Gradients(loss=loss)(params, names, KEY)
  name = "layers/1/mlp/up"
  step = 1e-2 / np.abs(found[name]).max()

  def at(sign):
    moved = jax.tree.map(lambda x: x, params)
    w = moved["run0"]["layer0"]["mlp"]["up"]
    moved["run0"]["layer0"]["mlp"]["up"] = w.at[1].add(
      sign * step * found[name]
    )
    return float(jax.jit(loss)(moved))

  want = step * np.sum(found[name] ** 2)
  assert (at(1) - at(-1)) / 2 == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize(
  "method, look",
  [
    (CorDA(rank=4), looks.Covariances),
    (LoRAGA(rank=4), looks.Gradients),
    (EVA(rank=4), lambda loss: looks.Directions(loss=loss, rank=4)),
  ],
)
def test_methods_start_from_them(case, method, look):
  model, params, tokens, loss, _ = case
  made = adapt.Adapt(method=method, look=look(loss=loss))(params, KEY)
  logits = jax.jit(lambda p: model.apply({"params": p}, tokens)[0])
  before = logits(params)
  chex.assert_trees_all_close(
    logits(made), before, atol=1e-4 * float(jnp.abs(before).max())
  )
