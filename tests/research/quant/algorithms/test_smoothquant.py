"""Tests that SmoothQuant preserves the model and smooths activations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tests.support as support
from research.quant import activations
from research.quant.algorithms import smoothquant
from research.typing import UserError


@functools.cache
def _case(family):
  # Without a window all layers are of one kind, compiled once.
  model = support.model(family, window=None, local_theta=None)
  params = support.params(model)
  layer = params["run0"]["layer0"]
  gain = layer["attention_norm"]["scale"].at[..., 5].multiply(30.0)
  layer = layer | {"attention_norm": {"scale": gain}}
  params = params | {"run0": params["run0"] | {"layer0": layer}}
  tokens = support.tokens()

  def run(params):
    return model.apply({"params": params}, tokens)[0]

  found = smoothquant.magnitudes(model, params, np.asarray(tokens), batch=1)
  return model, params, jax.jit(run), found


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.sample(2)
def test_the_model_is_preserved(family):
  model, params, run, found = _case(family)
  smooth = smoothquant.smooth(model, params, found, 0.5)
  want = run(params)
  error = jnp.linalg.norm(run(smooth) - want) / jnp.linalg.norm(want)
  assert error < 1e-4


def test_scales_are_those_of_the_paper():
  model, params, _, found = _case("llama")
  smooth = smoothquant.smooth(model, params, found, 0.8)
  old, new = (p["run0"]["layer0"] for p in (params, smooth))
  most = np.asarray(found["run0/layer0/attention/q"]["most"], np.float64)
  matrices = [np.asarray(old["attention"][name]) for name in "qkv"]
  w = np.max([abs(m).max(-1) for m in matrices], axis=0)
  s = most**0.8 / w**0.2
  gain = np.asarray(old["attention_norm"]["scale"]) / s
  np.testing.assert_allclose(new["attention_norm"]["scale"], gain, rtol=1e-5)
  want = matrices[1] * s[..., None]
  np.testing.assert_allclose(new["attention"]["k"], want, rtol=1e-5)
  np.testing.assert_array_equal(new["attention"]["o"], old["attention"]["o"])


def test_the_error_of_a_scale_per_tensor_decreases():
  model, params, run, found = _case("llama")
  smooth = smoothquant.smooth(model, params, found, 0.5)
  op = activations.Round(bits=8, per="tensor")
  rounded = activations.Inputs(op=op, targets="attention/(q|k|v)$")
  want = run(params)
  errors = [jnp.linalg.norm(run(rounded(p)) - want) for p in (params, smooth)]
  assert errors[1] < 0.6 * errors[0]


def test_dead_inputs_keep_their_scale():
  s = smoothquant.scales(jnp.array([0.0, 4.0]), jnp.array([1.0, 0.0]), 0.5)
  np.testing.assert_array_equal(s, 1)
  with pytest.raises(UserError, match="alpha"):
    smoothquant.SmoothQuant(alpha=1.5)
