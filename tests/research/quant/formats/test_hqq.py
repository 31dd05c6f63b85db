"""Tests HQQ against its authors' package."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from research.quant import qtensor
from research.quant.formats.affine import Affine
from research.quant.formats.hqq import HQQ
from research.typing import UserError

GOLDEN = pathlib.Path(__file__).parents[3] / "golden" / "hqq.json"
CASES = {case["bits"]: case for case in json.loads(GOLDEN.read_text("utf-8"))}


def _matrix():
  t = np.arange(16 * 128, dtype=np.float64)
  x = np.sin(0.7 * t + 0.3) * (0.5 + (37 * t % 101) / 101)
  return jnp.asarray(np.float32(x).reshape(16, 128).T)


@pytest.mark.parametrize("bits", CASES)
def test_codes_scales_and_zeros(bits):
  case = CASES[bits]
  # The package leaves beta alone, and stores float32 here.
  format = HQQ(bits=bits, block=64, growth=1.0, scale_dtype="float32")
  plain = qtensor.pack(_matrix(), format).normal_form()
  want = np.array([int(digit, 16) for digit in case["codes"]])
  np.testing.assert_array_equal(plain.codes.T, want.reshape(16, 128))
  for name in ("scale", "zero"):
    want = np.frombuffer(bytes.fromhex(case[name]), np.float32).reshape(16, 2)
    np.testing.assert_allclose(getattr(plain, name).T, want, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.sample(2)
def test_hqq_has_fewer_large_errors(bits):
  w = np.random.default_rng(bits).standard_t(4, (256, 32)).astype(np.float32)
  errors = [
    np.mean(np.abs(qtensor.pack(jnp.asarray(w), f).dense() - w))
    for f in (HQQ(bits=bits), Affine(bits=bits, zero="float"))
  ]
  assert errors[0] < errors[1]


def test_zeros_are_floats_and_count_as_bits():
  w = qtensor.pack(_matrix(), HQQ(bits=3))
  assert w.bits_per_weight == 3.5
  zeros = np.asarray(w.normal_form().zero, np.float32)
  assert np.any(zeros != np.round(zeros))


def test_bad_settings_raise():
  with pytest.raises(UserError, match="symmetric=False"):
    HQQ(symmetric=True)
