"""Tests LLM.int8 against bitsandbytes."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from research import weights
from research.quant import llm_int8, qtensor
from research.quant.activations import InputTensor

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "llm_int8.json"
CASES = json.loads(GOLDEN.read_text("utf-8"))
OUTLIERS = {(2, 7): 9.0, (0, 7): -20.0, (4, 3): 6.0, (1, 12): -7.5}
EQ = "...d,df->...f"


def _matrix(rows, columns, scale=1.0):
  t = np.arange(rows * columns, dtype=np.float64)
  x = scale * np.sin(0.7 * t + 0.3) * (0.5 + (37 * t % 101) / 101)
  return np.float16(x).reshape(rows, columns).astype(np.float32)


def _inputs():
  x = _matrix(5, 32, 2.5)
  for place, value in OUTLIERS.items():
    x[place] = value
  return jnp.asarray(x), qtensor.pack(
    jnp.asarray(_matrix(12, 32).T), llm_int8.INT8
  )


def _array(case, name, dtype, shape):
  return np.frombuffer(bytes.fromhex(case[name]), dtype).reshape(shape)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['threshold']:g}")
def test_codes_scales_and_products(case):
  x, w = _inputs()
  plain = w.normal_form()
  codes = np.asarray(plain.codes, np.int32).T - 128
  np.testing.assert_array_equal(codes, _array(case, "codes", "i1", (12, 32)))
  # Theirs are the largest magnitudes, ours a step.
  np.testing.assert_allclose(
    np.asarray(plain.scale)[0] * 127, _array(case, "scale", "f4", 12), rtol=1e-6
  )
  op = llm_int8.Outliers(threshold=case["threshold"])
  codes, scale, exact = op.parts(x)
  np.testing.assert_array_equal(codes, _array(case, "x_codes", "i1", (5, 32)))
  want = _array(case, "x_scale", "f4", 5)
  np.testing.assert_allclose(scale[:, 0] * 127, want, rtol=1e-6)
  assert np.flatnonzero(np.any(exact != 0, 0)).tolist() == case["columns"]
  got = weights.einsum(EQ, x, InputTensor(w, op=op))
  want = _array(case, "y", "f4", (5, 12))
  # Theirs is added up in float16.
  np.testing.assert_allclose(got, want, atol=2.0**-9 * np.abs(want).max())


def test_outliers_are_exact():
  x, w = _inputs()
  x = x.at[..., 7].multiply(100.0)
  want = np.asarray(x, np.float64) @ np.asarray(w.dense(), np.float64)
  errors = []
  for threshold in (6.0, 0.0):
    op = llm_int8.Outliers(threshold=threshold)
    got = weights.einsum(EQ, x, InputTensor(w, op=op))
    np.testing.assert_allclose(got, op(x) @ w.dense(), rtol=1e-5, atol=1e-4)
    errors.append(np.abs(got - want).mean())
  assert errors[0] < 0.1 * errors[1]
