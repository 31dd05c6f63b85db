"""Tests rounded activations against NumPy, integer products against float."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tests.support as support
from research import weights
from research.quant import activations, qtensor, static_inputs
from research.quant.activations import InputTensor, Round
from research.quant.algorithms.calibrate import Calibration
from research.quant.formats.affine import Affine
from research.quant.formats.int8 import Int8
from research.quant.llm_int8 import Outliers
from research.quant.reports import input_errors
from research.typing import UserError
from tests.support_lora import lora

EQ = "...d,df->...f"


@dataclasses.dataclass(frozen=True)
class Words:
  """A tokenizer of one text."""

  ids: list

  def encode(self, text):
    return self.ids if text is not None else []


def _x(shape=(3, 5, 32), seed=0):
  x = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(x, jnp.float32)


def _w(shape=(32, 12), seed=1):
  return _x(shape, seed)


@pytest.mark.parametrize("bits, clip", [(8, 1.0), (4, 1.0), (4, 0.9)])
def test_tokens_are_rounded_as_by_definition(bits, clip):
  x = np.asarray(_x(), np.float64)
  top = 2 ** (bits - 1) - 1
  scale = clip * abs(x).max(-1, keepdims=True) / top
  want = np.clip(np.round(x / scale), -top - 1, top) * scale
  got = Round(bits=bits, clip=clip)(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_scale_per_tensor_loses_all_but_a_massive_token():
  x = _x().at[0, 0, 3].set(1e4)
  rest = np.s_[1:]
  assert np.all(np.asarray(Round(per="tensor")(x))[rest] == 0)
  error = np.asarray(Round()(x) - x)[rest]
  assert np.abs(error).max() <= np.abs(x[rest]).max() / 127 / 2 + 1e-7


def test_groups_and_zeros():
  x = _x().at[..., :8].add(5.0)
  apart = Round(bits=4, group=8)(x)
  want = Round(bits=4)(x.reshape(3, 5, 4, 8)).reshape(x.shape)
  np.testing.assert_array_equal(apart, want)
  # Values of one sign need a zero point.
  one_sign = jnp.abs(x)
  errors = [
    jnp.abs(Round(bits=4, symmetric=s)(one_sign) - one_sign).mean()
    for s in (True, False)
  ]
  assert errors[1] < 0.7 * errors[0]


def test_a_scale_from_calibration_is_used():
  x = _x()
  leaf = InputTensor(_w(), jnp.float32(0.5), Round(per="tensor"))
  want = jnp.round(x / 0.5) * 0.5 @ _w()
  np.testing.assert_allclose(weights.einsum(EQ, x, leaf), want, atol=1e-5)


def test_zeros_stay_and_gradients_go_through():
  np.testing.assert_array_equal(Round()(jnp.zeros((2, 4))), 0)
  x, w = _x(), _w()
  leaf = InputTensor(w, op=Round(bits=4))
  got = jax.grad(lambda x: weights.einsum(EQ, x, leaf).sum())(x)
  # As if nothing were rounded; and the largest, which is the scale of all
  # errors: s = |largest| / 7, x = s code.
  a, sums = np.asarray(x, np.float64), np.asarray(w, np.float64).sum(1)
  scale = abs(a).max(-1, keepdims=True) / 7
  errors = ((np.round(a / scale) - a / scale) * sums).sum(-1, keepdims=True)
  largest = abs(a) == 7 * scale
  want = sums + largest * np.sign(a) * errors / 7
  np.testing.assert_allclose(got, want, atol=1e-4)


FORMATS = {
  "per output": Affine(block=0, bits=8, symmetric=True, rule="amax/qmax"),
  "bitsandbytes": Int8(),
  "groups": Affine(block=16, bits=4, symmetric=True),
  "zeros": Affine(block=16, bits=4),
  "fractions": Affine(block=16, bits=8, zero="float"),
}


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("per", ["token", "tensor"])
@pytest.mark.sample(6)
def test_integer_products_equal_float_products(format, per):
  x, w = _x(), qtensor.pack(_w(), format)
  op = Round(bits=8, per=per, integer=True)
  got = weights.einsum(EQ, x, InputTensor(w, op=op))
  want = np.asarray(op(x), np.float64) @ np.asarray(w.dense(), np.float64)
  # fp32's rounding of sums of 32 terms of about 1.
  np.testing.assert_allclose(got, want, atol=3e-5)


@pytest.mark.parametrize(
  "op",
  [
    Round(integer=True),
    Round(integer=True, per="tensor", full=True),
    Outliers(),
    Outliers(threshold=2.0),
  ],
)
def test_gradients_of_integer_products_are_those_of_floats(op):
  """Integers have no derivatives: all but the scales' gradient was lost."""
  x, w = _x(), qtensor.pack(_w(), Int8())
  dy = _x((3, 5, 12), 7)

  def gradient(product):
    return jax.grad(lambda x: (product(x) * dy).sum())(x)

  got = gradient(lambda x: weights.einsum(EQ, x, InputTensor(w, op=op)))
  want = gradient(lambda x: op(x) @ w.dense())
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_weights_without_integers_are_multiplied_as_they_are():
  x, op = _x(), Round(integer=True)
  got = weights.einsum(EQ, x, InputTensor(_w(), op=op))
  np.testing.assert_allclose(got, op(x) @ _w(), atol=1e-5)


@pytest.mark.slow
def test_scales_of_a_calibration_are_the_largest_inputs():
  model = support.model("llama", depth=2)
  params, tokens = support.params(model), np.asarray(support.tokens(4, 16))
  made = static_inputs.StaticInputs(
    calibration=Calibration(windows=2, length=16, batch=1), model=model
  )
  made = dataclasses.replace(made, tokenizer=Words(tokens.ravel().tolist()))
  fixed = made(params)
  windows = jnp.asarray(made.calibration.read(made.tokenizer).tokens)
  x, _ = input_errors.collect_inputs(
    model, params, windows, ("layers/1/mlp/down",)
  )["layers/1/mlp/down"]
  leaf = fixed["run0"]["layer0"]["mlp"]["down"]
  assert leaf.scale.shape == (2,)
  np.testing.assert_allclose(leaf.scale[1] * 127, jnp.abs(x).max(), rtol=1e-5)
  run = jax.jit(lambda p: model.apply({"params": p}, windows)[0])
  want = run(params)
  error = jnp.linalg.norm(run(fixed) - want) / jnp.linalg.norm(want)
  assert 0 < error < 0.05


def test_adapters_receive_unrounded_activations():
  x, w = _x(), qtensor.pack(_w(), FORMATS["groups"])
  a, b = _x((4, 32), 2), _x((4, 12), 3)
  op = Round(integer=True)
  adapted = lora(InputTensor(w, op=op), a, b)
  got = weights.einsum(EQ, x, adapted)
  want = op(x) @ w.dense() + x @ a.T @ b
  np.testing.assert_allclose(got, want, atol=1e-3)


def test_bad_settings_raise():
  with pytest.raises(UserError, match="group"):
    Round(group=5)(_x())
  with pytest.raises(UserError, match="no zero"):
    static_inputs.StaticInputs(op=Round())
  with pytest.raises(UserError, match="no matrix"):
    activations.Inputs(targets="/nothing$")(support.params(support.model()))
