"""Rotations leave logits, in fp32 to 1e-4, and spread outliers."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tests.support as support
from research import sharding, taps, tree, weights
from research.interop import ours
from research.nn.presets import Sparse
from research.nn.routing import Routing
from research.quant import (
  activations,
  hadamard,
  qtensor,
  quantize,
  rotate,
  untied,
)
from research.quant.calibrate import Calibration
from research.quant.formats.affine import Affine
from research.quant.gptq import GPTQ
from research.quant.methods import Compensated
from research.quant.rules import Quantization, Rule
from research.statistics import Covariance
from research.typing import UserError


@dataclasses.dataclass(frozen=True)
class Words:
  """A tokenizer of one text."""

  ids: list

  def encode(self, text):
    return self.ids if text is not None else []


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


# Tied and not; with biases; Gemma's 1 + w and scaled embeddings; experts.
@pytest.mark.parametrize(
  "family, changes",
  [
    ("llama", dict(tied=True)),
    ("qwen2", dict(tied=False)),
    ("gemma", {}),
    ("qwen3_moe", dict(sparse=SPARSE)),
  ],
)
def test_logits_stay(family, changes):
  model, params, tokens = _case(family, **changes)
  rotated = rotate.Rotate(model=model)(params, jax.random.key(3))
  run = _logits(model)
  want = run(params, tokens)
  assert _error(run(rotated, tokens), want) < 1e-4
  # All of it has moved.
  q = rotated["run0"]["layer0"]["attention"]["q"]
  assert q.dtype == jnp.float32
  assert _error(q, params["run0"]["layer0"]["attention"]["q"]) > 0.5


def test_an_untied_model_is_the_same():
  model, params, tokens = _case("llama", tied=True)
  rotated = rotate.Rotate(model=model, hidden=False)(params, jax.random.key(0))
  apart, plain = untied.untie(model, rotated)
  assert not apart.tied and plain["head"].shape == (32, 67)
  want = _logits(model)(rotated, tokens)
  np.testing.assert_allclose(_logits(apart)(plain, tokens), want, atol=1e-5)


def test_norms_before_layers_and_head_have_no_gain():
  model, params, _ = _case("gemma")
  folded = rotate.fold_norms(model, params)
  for layer in folded["run0"].values():
    np.testing.assert_array_equal(layer["attention_norm"]["scale"], 0)
  np.testing.assert_array_equal(folded["final_norm"]["scale"], 0)


def test_a_rotated_input_stands_for_the_same_matrix():
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


def test_what_is_packed_and_seen_stands_behind_the_rotation():
  model, params, tokens = _case("llama", tied=True, hidden=48)
  rotated = rotate.Rotate(model=model)(params, jax.random.key(0))
  packed = quantize.Quantize(format=Affine(bits=8, block=16))(rotated)
  op = activations.Round(bits=8)
  packed = activations.Inputs(op=op, targets="/down$")(packed)
  down = packed["run0"]["layer0"]["mlp"]["down"]
  assert isinstance(down.w.w, qtensor.QTensor)
  run = _logits(model)
  assert _error(run(packed, tokens), run(rotated, tokens)) < 0.05

  def seen(params):
    def loss(params):
      return model.apply({"params": params}, tokens)[0].sum()

    return taps.collect(loss, params, Covariance())

  path = "run0/layer0/mlp/down"
  before, after = (jax.jit(seen)(p)[path]["xx"] for p in (params, rotated))
  h = hadamard.matrix(48) / np.sqrt(48)
  want = h.T @ np.asarray(before, np.float64) @ h
  np.testing.assert_allclose(after, want, atol=1e-4 * np.abs(want).max())
  # A checkpoint's note makes the same tree again.
  note = json.loads(json.dumps(ours._describe(packed)))
  made = ours._abstract(note, "weights")
  assert jax.tree.structure(made) == jax.tree.structure(packed)


def test_gptq_compensates_behind_the_rotation():
  model, params, tokens = _case("llama", tied=True, hidden=48, depth=1)
  rotated = rotate.Rotate(model=model)(params, jax.random.key(0))
  format = Affine(block=16)
  run = _logits(model)
  want = run(params, tokens)
  errors = []
  for drift in (None, 0.0, 0.5):
    rule = Rule(match="/down$", format=format)
    if drift is not None:
      method = Compensated(options=GPTQ(drift=drift))
      rule = dataclasses.replace(rule, method=method)
    calibration = Calibration(windows=2, length=16)
    made = Quantization(rules=(rule,), calibration=calibration, model=model)
    tokenizer = Words(np.asarray(tokens).ravel().tolist())
    made = dataclasses.replace(made, tokenizer=tokenizer)
    packed = made(rotated)
    down = next(tree.layers(packed))["mlp"]["down"]
    assert isinstance(down, activations.InputTensor)
    assert isinstance(down.w, qtensor.QTensor)
    errors.append(_error(run(packed, tokens), want))
  assert max(errors[1:]) < 0.95 * errors[0]


def test_on_eight_devices_as_on_one():
  """Rotated inputs, whose axis is cut; integers; a head of its own."""
  model, params, tokens = _case("llama", tied=True, hidden=48, vocab=64)
  packed = rotate.Rotate(model=model)(params, jax.random.key(0))
  packed = quantize.Quantize(format=Affine(block=16))(packed)
  packed = activations.Inputs(op=activations.Round(integer=True))(packed)
  run = _logits(model)
  want = run(packed, tokens)
  layout = sharding.Layout(data=2, fsdp=2, tensor=2)
  mesh = layout.mesh()
  cut = layout.shardings(packed, mesh, sharding.counts(model))
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
