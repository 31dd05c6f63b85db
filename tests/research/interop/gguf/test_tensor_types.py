"""Block types, against the gguf package's bytes and values."""

import hashlib
import json
import pathlib

import numpy as np
import pytest

from research.interop.gguf import tensor_types
from research.quant.formats import ggml
from research.typing import UserError

GOLDEN = pathlib.Path(__file__).parents[3] / "golden" / "models"
ENCODINGS = json.loads((GOLDEN / "gguf_encodings.json").read_text())
X = np.asarray(ENCODINGS.pop("x"), np.float32)
BLOCKS = list(ggml.KINDS)

# sha1[:16] of the C reference's bytes, and RMSE (research/quant/MATH.md 4).
C_REFERENCE = {
  "Q4_0": ("312d15e84e9c0152", 0.049931),
  "Q4_1": ("a61f55e3056a41da", 0.050446),
  "Q5_0": ("aa281130c820987c", 0.024932),
  "Q5_1": ("819269d18243cbbe", 0.024293),
  "Q8_0": ("552edde26ffcff24", 0.002995),
}


@pytest.mark.parametrize("kind", ENCODINGS)
def test_bytes_and_values_are_those_of_the_gguf_package(kind):
  raw = tensor_types.encode(kind, X)
  assert raw.tobytes().hex() == ENCODINGS[kind]["bytes"]
  values = tensor_types.decode(kind, raw, (8, 32))
  want = np.asarray(ENCODINGS[kind]["values"], np.float32).reshape(8, 32)
  np.testing.assert_array_equal(values, want)


@pytest.mark.parametrize("kind", C_REFERENCE)
def test_bytes_are_those_of_the_c_reference(kind):
  raw = tensor_types.encode(kind, X)
  digest, rmse = C_REFERENCE[kind]
  assert hashlib.sha1(raw.tobytes()).hexdigest()[:16] == digest
  error = tensor_types.decode(kind, raw, X.shape).astype(np.float64) - X
  assert abs(np.sqrt((error**2).mean()) - rmse) < 1e-6


@pytest.mark.parametrize("kind", ggml.TYPES)
def test_sizes_are_those_of_the_formats(kind):
  t, format = tensor_types.TYPES[kind], ggml.TYPES[kind]
  assert (t.block, t.nbytes) == (format.block, format.nbytes)
  raw = np.random.default_rng(0).integers(0, 256, (5, 3 * t.nbytes), np.uint8)
  np.testing.assert_array_equal(format.join(format.split(raw)), raw)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("value", [0.0, 1.5, -1.5])
def test_a_constant_block_is_exact_to_a_half(kind, value):
  x = np.full((2, 32), value, np.float32)
  back = tensor_types.decode(kind, tensor_types.encode(kind, x), x.shape)
  # The scale is rounded to float16, codes go up to 127.
  np.testing.assert_allclose(back, x, rtol=2**-11)


@pytest.mark.parametrize("kind", BLOCKS)
def test_one_outlier_keeps_its_place(kind):
  x = np.zeros((1, 64), np.float32)
  x[0, 45] = -3.0
  back = tensor_types.decode(kind, tensor_types.encode(kind, x), x.shape)
  # The scale, rounded to float16, times the whole range.
  np.testing.assert_allclose(back, x, atol=3 * 2**-11)


def test_bfloat16_rounds_to_even_and_keeps_nans():
  bits = np.array(
    [0x3F808000, 0x3F818000, 0x3F808001, 0x7F800000, 0x7F800001, 0xFF7FFFFF],
    np.uint32,
  )
  raw = tensor_types.encode("BF16", bits.view(np.float32)).view(np.uint16)
  assert raw.tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x7FC0, 0xFF80]


@pytest.mark.parametrize("kind", ["IQ2_XXS", "IQ1_S", "Q8_1"])
def test_other_types_are_named(kind):
  with pytest.raises(UserError, match=f"type {kind}; supported: F32"):
    tensor_types.decode(kind, np.zeros(0, np.uint8), (0,))
  with pytest.raises(UserError, match=f"type {kind}; supported: F32"):
    tensor_types.encode(kind, X)


def test_rows_must_be_whole_blocks_of_finite_numbers():
  with pytest.raises(UserError, match=r"multiple of 32.*\(2, 33\)"):
    tensor_types.encode("Q4_1", np.zeros((2, 33), np.float32))
  with pytest.raises(UserError, match="not finite"):
    tensor_types.encode("Q4_1", np.full((32,), np.nan, np.float32))
