"""Tests ggml's block types against bytes and values of the C code."""

import hashlib
import json
import pathlib

import chex
import jax
import numpy as np
import pytest

from research.quant import qtensor
from research.quant.formats import ggml, iq4, kquants
from research.quant.numerics import ggml_bits, scale_search
from research.typing import UserError

TESTS = pathlib.Path(__file__).parents[3]
GOLDEN = np.load(TESTS / "golden" / "ggml.npz")
W, IMPORTANCE = GOLDEN["w"], GOLDEN["importance"]
FORMATS = ggml.TYPES
WEIGHED = [kind for kind in FORMATS if f"{kind}.i" in GOLDEN]
# research/quant/MATH.md 4: one row of 256; sha1[:16] of the bytes, and RMSE.
X = json.loads((TESTS / "golden/models/gguf_encodings.json").read_text())["x"]
X = np.asarray(X, np.float32)[:, None]
SPECIFIED = {
  "Q2_K": ("6452ab06ea5896e1", 0.183189),
  "Q3_K": ("ee1f9272706325ca", 0.098054),
  "Q4_K": ("c3d07bba20c8bd02", 0.047391),
  "Q5_K": ("77024efafc6e0fd0", 0.022733),
  "Q6_K": ("ee10613d2d5132c0", 0.011003),
  "IQ4_NL": ("5c4d295a8e30cb21", 0.052277),
  "IQ4_XS": ("2f6e61d4a1b73433", 0.050994),
  "MXFP4": ("2c3c0ffdea6c9e73", 0.083348),
  "NVFP4": ("65ccdd967e40b68b", 0.078599),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_bytes_are_those_of_the_c_code(kind):
  format = FORMATS[kind]
  got = format.join(format.encode(np.ascontiguousarray(W.T)))
  np.testing.assert_array_equal(got, GOLDEN[kind])


@pytest.mark.parametrize("kind", WEIGHED)
def test_bytes_with_importances_are_those_of_the_c_code(kind):
  format = FORMATS[kind]
  got = format.join(format.encode(np.ascontiguousarray(W.T), IMPORTANCE))
  np.testing.assert_array_equal(got, GOLDEN[f"{kind}.i"])
  assert (got != GOLDEN[kind]).any()


@pytest.mark.parametrize("kind", SPECIFIED)
def test_a_row_is_encoded_as_specified(kind):
  format = iq4.IQ4NL(tries=0) if kind == "IQ4_NL" else FORMATS[kind]
  parts = format.encode(X)
  digest, rmse = SPECIFIED[kind]
  found = hashlib.sha1(format.join(parts).tobytes()).hexdigest()
  assert found[:16] == digest
  error = np.asarray(format.decode(parts), np.float64) - X
  assert abs(np.sqrt((error**2).mean()) - rmse) < 1e-6


@pytest.mark.parametrize("kind", FORMATS)
def test_random_bytes_mean_what_they_do_in_c(kind):
  format, raw = FORMATS[kind], GOLDEN[f"{kind}.raw"]
  parts = format.split(raw)
  np.testing.assert_array_equal(format.join(parts), raw)
  want = GOLDEN[f"{kind}.values"]
  np.testing.assert_array_equal(format.values(parts).T, want)
  got = np.asarray(jax.jit(format.decode)(parts)).T
  # A scale below float32's normal range is 0 to XLA.
  tiny = np.abs(want) < 16 * np.finfo(np.float32).tiny
  np.testing.assert_array_equal(got, np.where(tiny, got, want))


def test_importances_lower_the_error_they_weigh():
  rng = np.random.default_rng(1)
  w = rng.standard_normal((256, 64)).astype(np.float32)
  importance = rng.random(256).astype(np.float32) ** 8

  def error(format, *given):
    off = np.asarray(format.decode(format.encode(w, *given))) - w
    return (importance[:, None] * off**2).sum()

  for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "IQ4_XS"):
    format = FORMATS[kind]
    assert error(format, importance) < error(format)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_leaf_takes_the_bits_of_its_type(kind):
  format = FORMATS[kind]
  leaf = qtensor.pack(np.ascontiguousarray(W.T), format)
  assert leaf.bits_per_weight == 8 * format.nbytes / format.block
  assert leaf.shape == (512, 12)
  assert format.name == kind


def test_a_stack_is_encoded_matrix_by_matrix():
  format = kquants.Q6K()
  w = np.ascontiguousarray(W.T)
  both = qtensor.pack(np.stack([w, -w]), format)
  one = format.encode(w)
  chex.assert_trees_all_equal(jax.tree.map(lambda x: x[0], both.parts), one)
  np.testing.assert_array_equal(both.dense()[1], -both.dense()[0])


def test_many_pieces_are_one_matrix(monkeypatch):
  from research.quant import ggml_format

  format = kquants.Q4K()
  w = np.random.default_rng(2).standard_normal((1024, 9)).astype(np.float32)
  whole = format.encode(w, IMPORTANCE.repeat(2))
  monkeypatch.setattr(ggml_format, "_COLUMNS", 4)
  monkeypatch.setattr(ggml_format, "_PIECE", 1)
  chex.assert_trees_all_equal(format.encode(w, IMPORTANCE.repeat(2)), whole)


@pytest.mark.parametrize(
  "bits,run", [(1, 32), (2, 32), (4, 16), (4, 1), (2, 4)]
)
def test_folding_codes_keeps_them(bits, run):
  rng = np.random.default_rng(0)
  codes = rng.integers(0, 2**bits, (2, 256, 3)).astype(np.uint8)
  packed = ggml_bits.fold(codes, bits, run)
  assert packed.shape == (2, 256 * bits // 8, 3)
  np.testing.assert_array_equal(ggml_bits.unfold(packed, bits, run), codes)


def test_folding_scales_of_six_bits_keeps_them():
  rng = np.random.default_rng(0)
  scales = rng.integers(0, 64, (4, 16, 3)).astype(np.uint8)
  packed = ggml_bits.fold_sixes(scales)
  assert packed.shape == (4, 12, 3)
  np.testing.assert_array_equal(ggml_bits.unfold_sixes(packed), scales)
  pair = scales[:, :8], scales[:, 8:]
  chex.assert_trees_all_equal(
    ggml_bits.unfold_pairs(ggml_bits.fold_pairs(*pair)), pair
  )


def test_a_search_is_at_least_as_good_as_the_obvious_scale():
  rng = np.random.default_rng(3)
  x = rng.standard_normal((16, 200)).astype(np.float32)
  scale, codes = scale_search.symmetric(x, 8)
  error = ((x**2) * (scale * (codes - 8.0) - x) ** 2).sum(0)
  plain = np.take_along_axis(x, abs(x).argmax(0)[None], 0)[0] / -8
  obvious = np.clip(np.rint(x / plain), -8, 7) * plain
  assert (error <= ((x**2) * (obvious - x) ** 2).sum(0) * (1 + 1e-5)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_infinite_weights_are_refused(bad):
  w = np.zeros((256, 2), np.float32)
  w[3, 1] = bad
  with pytest.raises(UserError, match="Q4_K cannot hold .* not finite"):
    kquants.Q4K().encode(w)


def test_weights_beyond_a_scales_range_are_refused():
  w = np.full((256, 2), 1e9, np.float32)
  with pytest.raises(
    UserError, match=r"Q6_K: scale is beyond .*float16.*1e\+09"
  ):
    kquants.Q6K().encode(w)


def test_rows_must_be_whole_blocks():
  with pytest.raises(UserError, match="Q4_K: 576 inputs are no multiple"):
    qtensor.pack(np.zeros((576, 2), np.float32), kquants.Q4K())
  with pytest.raises(UserError, match="Q4_K: block is 32, expected 256"):
    kquants.Q4K(block=32)
