"""Tests that inputs are unchanged, and errors are medians over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tests.support as support
from research.quant.algorithms import calibrate
from research.quant.reports import input_errors
from research.typing import UserError


def test_inputs_of_the_middle_layer():
  model = support.model("llama", depth=2)
  params, tokens = support.params(model), support.tokens(2, 8)
  address = "layers/1/attention/q"
  found = input_errors.collect_inputs(model, params, tokens, (address,))
  x, w = found[address]
  # By hand: what the first layer puts out, through the second one's norm.
  one = jax.tree.map(lambda a: a[0], params["run0"]["layer0"])
  table = params["embed"][tokens]
  block = model.stack.blocks[0]
  hidden = calibrate.outputs(block, one, table)
  gain = params["run0"]["layer0"]["attention_norm"]["scale"][1]
  wide = np.asarray(hidden, np.float64)
  rms = np.sqrt((wide**2).mean(-1, keepdims=True) + block.norm.eps)
  want = (wide / rms * np.asarray(gain)).reshape(16, -1)
  np.testing.assert_allclose(x, want, atol=1e-5)
  np.testing.assert_array_equal(
    w, params["run0"]["layer0"]["attention"]["q"][1]
  )
  with pytest.raises(UserError, match="no such matrix"):
    input_errors.collect_inputs(model, params, tokens, ("layers/9/mlp/down",))


def test_medians_show_errors_hidden_by_a_massive_token():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((64, 32)).astype(np.float32)
  x[0, 5] = 5e3
  w = rng.standard_normal((32, 16)).astype(np.float32)
  found = input_errors.errors(jnp.asarray(x), jnp.asarray(w), jax.random.key(0))
  assert tuple(sorted(found)) == tuple(sorted(input_errors.COLUMNS))
  row = {name: float(value) for name, value in found.items()}
  assert row["A8 tensor"] == 1  # all other tokens are rounded to 0
  assert row["A8 token"] < 0.02
  assert row["outliers rotated"] < row["outliers"] / 4
  step = np.abs(x).max() / 127
  near = np.round(x / step) * step
  both = np.linalg.norm((near - x) @ w) / np.linalg.norm(x @ w)
  assert both < 0.02  # which the error over all tokens hides
