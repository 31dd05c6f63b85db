"""Other tools' tensors: read as their definitions say, and written back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.interop.quantized import awq, bnb, checkpoint_formats, gptq
from research.interop.quantized.integers import to_integers
from research.quant import qtensor
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.ggml import GGML
from research.quant.formats.int8 import Int8
from research.typing import UserError

I, O, GROUP = 64, 32, 32


def rng(seed=0):
  return np.random.default_rng(seed)


def random_tensors(bits, version, ordered=True, zero=None, seed=0):
  """Returns a module of GPTQ, of random codes, and the matrix `[I, O]`."""
  r, top = rng(seed), 2**bits - 1
  codes = r.integers(0, top + 1, (I, O)).astype(np.uint8)
  if zero is None:
    zero = r.integers(1 if version == 1 else 0, top + 1, (I // GROUP, O))
  zero = np.broadcast_to(zero, (I // GROUP, O)).astype(np.uint8)
  scale = r.uniform(0.01, 0.1, (I // GROUP, O)).astype(np.float16)
  group = np.arange(I, dtype=np.int32) // GROUP
  if not ordered:
    group = r.permutation(group)
  stored = zero - (version == 1)
  tensors = {
    "qweight": streams(codes, bits),
    "qzeros": np.ascontiguousarray(streams(stored.T, bits).T),
    "scales": scale,
    "g_idx": group,
  }
  w = scale[group].astype(np.float32) * (codes.astype(np.float32) - zero[group])
  return tensors, w


def streams(codes, bits):
  """Returns each column as one number's little-endian words."""
  out = []
  for column in codes.T:
    whole = sum(int(code) << (i * bits) for i, code in enumerate(column))
    raw = whole.to_bytes(len(column) * bits // 8, "little")
    out.append(np.frombuffer(raw, np.int32))
  return np.stack(out, 1)


def same(got, want):
  assert list(got) == list(want)
  for name, x in want.items():
    assert (got[name].dtype, got[name].shape) == (x.dtype, x.shape), name
    np.testing.assert_array_equal(got[name], x, name)


def read(tensors, bits, version, **scheme):
  scheme = gptq.Scheme(bits=bits, group=GROUP, version=version, **scheme)
  return gptq.from_tensors(tensors, scheme)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_its_definition_and_written_back(bits, version, ordered):
  tensors, want = random_tensors(bits, version, ordered)
  w = read(tensors, bits, version, symmetric=False)
  assert w.shape == (I, O) and (w.order is None) == ordered
  np.testing.assert_array_equal(w.dense(), want)
  # The codes take so many bits, and no more.
  assert w.parts["codes"].nbytes == I * O * bits // 8
  same(gptq.to_tensors(to_integers(w, "w"), version), tensors)


@pytest.mark.parametrize(
  ("version", "word"), [(1, 0x77777777), (2, 0x88888888)]
)
def test_words_of_symmetric_zeros(version, word):
  w = qtensor.pack(
    rng().standard_normal((I, O)), Affine(block=GROUP, symmetric=True)
  )
  tensors = gptq.to_tensors(to_integers(w, "w"), version)
  assert (tensors["qzeros"].view(np.uint32) == word).all()
  for said in (1, 2):
    scheme = gptq.Scheme(group=GROUP, version=said)
    assert gptq.detect_version(scheme, {"w": tensors}).version == version


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("said", [1, 2])
def test_the_numbers_tell_the_version(bits, version, said):
  """Weights are as often negative as positive; zeros off by one are seen."""
  x = rng(1).standard_normal((256, 64)).astype(np.float32)
  w = qtensor.pack(x, Affine(bits=bits, block=GROUP))
  # Grids that begin or end at 0 have no zero that version 1 can store.
  found = to_integers(w, "w")
  if version == 1 and not found.zero.all():
    pytest.skip("a zero of 0")
  tensors = gptq.to_tensors(found, version)
  scheme = gptq.Scheme(bits=bits, group=GROUP, symmetric=False, version=said)
  assert (
    gptq.detect_version(scheme, {"a": tensors, "b": tensors}).version == version
  )


def test_few_codes_tell_nothing():
  tensors, _ = random_tensors(8, 2)
  for said in (1, 2):
    scheme = gptq.Scheme(bits=8, group=GROUP, symmetric=False, version=said)
    assert gptq.detect_version(scheme, {"w": tensors}).version == said


def test_version_1_cuts_a_zero_of_0_and_cannot_write_it():
  tensors, want = random_tensors(4, 2, zero=0)
  cut = tensors | {"qzeros": np.full_like(tensors["qzeros"], -1)}
  w = read(cut, 4, 1, symmetric=False)
  np.testing.assert_array_equal(w.dense(), want)
  with pytest.raises(UserError, match="zero does not fit: found 0"):
    gptq.to_tensors(to_integers(w, "w"), 1)
  same(gptq.to_tensors(to_integers(w, "w"), 2), tensors)
  writer = checkpoint_formats.Gptq(version=1)
  assert writer.choose([writer.describe(w, "w")], []).version == 2


@pytest.mark.parametrize("group", [GROUP, 0])
def test_awq_is_its_definition_and_written_back(group):
  r, size = rng(), group or I
  shape = (I // size, O)
  codes = r.integers(0, 16, (I, O)).astype(np.uint8)
  zero = r.integers(0, 16, shape).astype(np.uint8)
  scale = r.uniform(0.01, 0.1, shape).astype(np.float16)

  def words(x):
    out = np.zeros((len(x), O // 8), np.uint32)
    for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
      out |= x[:, column::8].astype(np.uint32) << (4 * i)
    return out.view(np.int32)

  tensors = {"qweight": words(codes), "qzeros": words(zero), "scales": scale}
  w = awq.from_tensors(tensors, awq.Scheme(group=group))
  spread = functools.partial(np.repeat, repeats=size, axis=0)
  want = spread(scale).astype(np.float32) * (
    codes.astype(np.float32) - spread(zero)
  )
  np.testing.assert_array_equal(w.dense(), want)
  same(awq.to_tensors(to_integers(w, "w")), tensors)


@pytest.mark.parametrize("words", [1, 4])
def test_rows_of_gemv_are_outputs(words):
  r, groups = rng(), I // GROUP
  codes = r.integers(0, 16, (O, I)).astype(np.uint8)
  zero = r.integers(0, 16, (O, 8 * words)).astype(np.uint8)
  scale = r.uniform(0.01, 0.1, (O, 8 * words)).astype(np.float16)

  def nibbles(x):
    return np.ascontiguousarray(streams(x.T, 4).T)

  w = awq.from_tensors(
    {"qweight": nibbles(codes), "qzeros": nibbles(zero), "scales": scale},
    awq.Scheme(group=GROUP, version="gemv"),
  )
  wide = [np.repeat(x[:, :groups], GROUP, 1) for x in (zero, scale)]
  want = wide[1].astype(np.float32) * (codes.astype(np.float32) - wide[0])
  np.testing.assert_array_equal(w.dense(), want.T)


def test_int8_is_its_definition_and_written_back():
  r = rng()
  tensors = {
    "weight": r.integers(-127, 128, (O, I)).astype(np.int8),
    "SCB": r.uniform(0.1, 3, O).astype(np.float32),
    "weight_format": np.asarray(0, np.uint8),
  }
  w = bnb.from_tensors(tensors)
  want = tensors["weight"] * (tensors["SCB"][:, None] / 127)
  np.testing.assert_allclose(w.dense(), want.T, rtol=3e-7)
  np.testing.assert_allclose(w.normal_form().dense(), want.T, rtol=3e-7)
  same(bnb.to_tensors(w), tensors)


def test_int8_rounds_to_nearest_even_of_127():
  w = np.float32([[2.0, 0], [1.0, 0], [-2.0, 0], [2 * 2.5 / 127, 0]])
  packed = qtensor.pack(w, Int8())
  np.testing.assert_array_equal(packed.parts["codes"][:, 0], [127, 64, -127, 2])
  np.testing.assert_array_equal(packed.parts["top"], [2, 0])
  assert not np.asarray(packed.dense())[:, 1].any()
  again = jax.jit(lambda x: qtensor.pack(x, Int8()))(jnp.asarray(w))
  np.testing.assert_array_equal(again.parts["codes"], packed.parts["codes"])


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_blocks_of_ggml_go_out_without_loss(kind):
  w = qtensor.pack(rng().standard_normal((I, O)).astype("f4"), GGML(kind=kind))
  found = to_integers(w, "w")
  assert (found.bits, found.size) == (int(kind[1]), 32)
  again = read(gptq.to_tensors(found, 1), found.bits, 1)
  np.testing.assert_array_equal(again.dense(), w.dense())


def test_codes_of_4_bits_that_were_stored_as_floats():
  w = qtensor.pack(rng().standard_normal((I, O)).astype("f4"), Codebook())
  tensors = bnb.to_tensors(w)
  for kind in ("float32", "bfloat16"):
    viewed = tensors["weight"].reshape(-1).view(jnp.dtype(kind))[:, None]
    got = bnb.from_tensors(tensors | {"weight": viewed})
    np.testing.assert_array_equal(got.parts["codes"], w.parts["codes"])
