"""Tests that rotations preserve logits, to 1e-4 in fp32, spread outliers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tests.support as support
from research import sharding, taps, weights
from research.interop import native
from research.nn.attention import CrossAttention
from research.nn.cross_attention import GatedCrossAttention
from research.nn.mlp import Mlp
from research.nn.moe.routing import Routing
from research.nn.presets import Sparse
from research.nn.stack import Stack
from research.nn.time_embedding import TimeEmbedding
from research.quant import activations, qtensor, quantize, untied_embedding
from research.quant.algorithms import rotate
from research.quant.formats.affine import Affine
from research.quant.numerics import hadamard
from research.quant.quantize_by_rules import Quantization, Rule
from research.taps.statistics import Covariance
from research.typing import UserError

SPARSE = Sparse(routing=Routing(experts=3, active=2), hidden=24, shared=1)


@functools.cache
def _logits(model):
  def run(params, tokens):
    hidden, _ = model.apply({"params": params}, tokens)
    return model.apply({"params": params}, hidden, method="logits")

  return jax.jit(run)


def _case(family, **changes):
  model = support.model(family, **changes)
  return model, support.params(model), support.tokens()


def _error(got, want):
  return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def _rotated(family="qwen2", **changes):
  """Returns a case, and its rotation; that of most tests has biases."""
  changes = changes or dict(tied=True, hidden=48, vocab=64)
  return _turned(family, tuple(changes.items()))


@functools.cache
def _turned(family, changes):
  model, params, tokens = _case(family, **dict(changes))
  rotated = rotate.Rotate(model=model)(params, jax.random.key(3))
  return model, params, rotated, tokens


# Biases and tied embeddings; Gemma's 1 + w and scaled embeddings; experts.
@pytest.mark.slow
@pytest.mark.parametrize(
  "family, changes",
  [
    ("qwen2", {}),
    ("gemma", dict(depth=1)),
    ("qwen3_moe", dict(depth=1, sparse=SPARSE)),
  ],
)
@pytest.mark.sample(4)
def test_logits_are_preserved(family, changes):
  model, params, rotated, tokens = _rotated(family, **changes)
  run = _logits(model)
  assert _error(run(rotated, tokens), run(params, tokens)) < 1e-4
  # All of it has moved.
  q = rotated["run0"]["layer0"]["attention"]["q"]
  assert q.dtype == jnp.float32
  assert _error(q, params["run0"]["layer0"]["attention"]["q"]) > 0.5


def test_an_untied_model_is_the_same():
  model, _, rotated, tokens = _rotated()
  apart, plain = untied_embedding.untie(model, rotated)
  assert not apart.tied and plain["head"].shape == (32, 64)
  want = _logits(model)(rotated, tokens)
  np.testing.assert_allclose(_logits(apart)(plain, tokens), want, atol=1e-5)


def test_norms_before_layers_and_head_have_no_gain():
  model, params, _ = _case("gemma")
  folded = rotate.fold_norms(model, params)
  for layer in folded["run0"].values():
    np.testing.assert_array_equal(layer["attention_norm"]["scale"], 0)
  np.testing.assert_array_equal(folded["final_norm"]["scale"], 0)


def test_a_rotated_input_has_the_same_dense_matrix():
  w = jnp.asarray(np.random.default_rng(0).standard_normal((24, 5)), "float32")
  leaf = rotate.rotate_inputs(w)
  np.testing.assert_allclose(weights.dense(leaf), w, atol=1e-5)
  x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 24)), "float32")
  got = weights.einsum("...i,io->...o", x, leaf)
  np.testing.assert_allclose(got, x @ w, atol=1e-4)
  assert _error(leaf.w, w) > 0.5


def test_a_rotation_spreads_one_massive_channel():
  x = np.random.default_rng(2).standard_normal((50, 576)).astype(np.float32)
  x[:, 7] *= 100
  y = np.asarray(x @ hadamard.random_matrix(jax.random.key(0), 576))
  peaks = [np.mean(np.max(abs(a), -1) / np.std(a, -1)) for a in (x, y)]
  # A spike of size a becomes a / sqrt(n) everywhere.
  assert peaks[0] > 15 and peaks[1] < 5


def _packed():
  model, params, rotated, tokens = _rotated()
  rule = Rule(match="^layers/", format=Affine(bits=8, block=16))
  packed = Quantization(rules=(rule,))(rotated)
  op = activations.Round(bits=8, integer=True)
  return model, activations.Inputs(op=op)(packed), rotated, tokens


@pytest.mark.slow
def test_packing_applies_after_the_rotation():
  model, packed, rotated, tokens = _packed()
  down = packed["run0"]["layer0"]["mlp"]["down"]
  assert down.op == rotate.Hadamard()
  assert isinstance(down.w.w, qtensor.QTensor)
  again = quantize.Quantize(format=Affine(bits=8, block=16))(rotated)
  got = again["run0"]["layer0"]["mlp"]["down"].w
  assert jax.tree.structure(got) == jax.tree.structure(down.w.w)
  jax.tree.map(np.testing.assert_array_equal, got.parts, down.w.w.parts)
  run = _logits(model)
  assert _error(run(packed, tokens), run(rotated, tokens)) < 0.05
  # A checkpoint's note makes the same tree again.
  note = json.loads(json.dumps(native._describe(packed)))
  made = native._abstract(note, "weights")
  assert jax.tree.structure(made) == jax.tree.structure(packed)


def test_taps_see_rotated_inputs():
  x = np.random.default_rng(0).standard_normal((2, 5, 48)).astype(np.float32)
  x, w = jnp.asarray(x), jnp.ones((1, 48, 3))
  layer = {"mlp": {"down": rotate.rotate_inputs(w)}}

  def loss(params):
    down = jax.tree.map(lambda a: a[0], params["run0"]["layer0"]["mlp"]["down"])
    return weights.einsum("...d,df->...f", x, down).sum()

  found = taps.collect(loss, {"run0": {"layer0": layer}}, Covariance())
  turned = np.asarray(x, np.float64).reshape(-1, 48) @ hadamard.matrix(48)
  want = turned.T @ turned / 48
  got = found["run0/layer0/mlp/down"]["xx"][0]
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.slow
def test_on_eight_devices_as_on_one():
  """Rotated inputs with a sharded axis; integers; an untied head."""
  model, packed, _, tokens = _packed()
  run = _logits(model)
  want = run(packed, tokens)
  layout = sharding.Layout(data=2, fsdp=2, tensor=2)
  mesh = layout.mesh()
  cut = layout.shardings(packed, mesh, sharding.head_counts(model))
  with jax.set_mesh(mesh):
    got = run(jax.device_put(packed, cut), tokens)
  # Sums in another order now and then round an activation the other way.
  assert _error(np.asarray(got), np.asarray(want)) < 5e-3


def test_normalised_outputs_are_refused():
  model, params, _ = _case("gemma2")
  with pytest.raises(UserError, match="Gemma 2"):
    rotate.Rotate(model=model)(params, jax.random.key(0))
  with pytest.raises(UserError, match="no model"):
    rotate.Rotate()(params, jax.random.key(0))


def _with_cross_attention():
  model = support.model(depth=1)
  (block,) = model.stack.blocks
  cross = GatedCrossAttention(
    attention=CrossAttention(heads=2, head_dim=8),
    mlp=Mlp(hidden=8),
    media_width=4,
  )
  return model.clone(stack=Stack(1, (block.clone(cross=cross),)))


@pytest.mark.parametrize(
  "make, options, match",
  [
    # x (1 + scale) + shift: neither is in the basis of the rotated stream.
    (
      lambda: support.model(
        depth=1, time_embedding=TimeEmbedding(features=8, hidden=8, width=8)
      ),
      {},
      "adaptive layer norm",
    ),
    (_with_cross_attention, {}, "cross-attention"),
    # `o` would be rotated, and the keys that are its values would not.
    (
      lambda: support.gemma4(global_values="keys"),
      dict(residual=False),
      "values that are keys",
    ),
  ],
)
def test_layers_that_do_not_commute_are_refused(make, options, match):
  model = make()
  params = support.params(model)
  with pytest.raises(UserError, match=match):
    rotate.Rotate(model=model, **options)(params, jax.random.key(0))


@pytest.mark.parametrize(
  "changes", [{}, dict(kinds=("local", "global") * 2, kv_shared_layers=2)]
)
def test_normalised_and_shared_values_are_rotated(changes):
  """A norm without a gain commutes with rotations; borrowers share R2."""
  model = support.gemma4(**changes)
  params, tokens = support.params(model), support.tokens()
  made = rotate.Rotate(model=model, residual=False)
  rotated = made(params, jax.random.key(3))
  run = _logits(model)
  assert _error(run(rotated, tokens), run(params, tokens)) < 1e-4
