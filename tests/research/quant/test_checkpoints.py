"""Other tools' tensors: read as their definitions say, and written back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.quant import bitstream, qtensor
from research.quant.checkpoints import awq, bnb, gptq, writers
from research.quant.checkpoints.integers import integers
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
  same(gptq.to_tensors(integers(w, "w"), version), tensors)


@pytest.mark.parametrize(
  ("version", "word"), [(1, 0x77777777), (2, 0x88888888)]
)
def test_words_of_symmetric_zeros(version, word):
  w = qtensor.pack(
    rng().standard_normal((I, O)), Affine(block=GROUP, symmetric=True)
  )
  tensors = gptq.to_tensors(integers(w, "w"), version)
  assert (tensors["qzeros"].view(np.uint32) == word).all()
  for said in (1, 2):
    scheme = gptq.Scheme(group=GROUP, version=said)
    assert gptq.detected(scheme, {"w": tensors}).version == version


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("said", [1, 2])
def test_the_numbers_tell_the_version(bits, version, said):
  """Weights are as often negative as positive; zeros off by one are seen."""
  x = rng(1).standard_normal((256, 64)).astype(np.float32)
  w = qtensor.pack(x, Affine(bits=bits, block=GROUP))
  # Grids that begin or end at 0 have no zero that version 1 can store.
  found = integers(w, "w")
  if version == 1 and not found.zero.all():
    pytest.skip("a zero of 0")
  tensors = gptq.to_tensors(found, version)
  scheme = gptq.Scheme(bits=bits, group=GROUP, symmetric=False, version=said)
  assert gptq.detected(scheme, {"a": tensors, "b": tensors}).version == version


def test_few_codes_tell_nothing():
  tensors, _ = random_tensors(8, 2)
  for said in (1, 2):
    scheme = gptq.Scheme(bits=8, group=GROUP, symmetric=False, version=said)
    assert gptq.detected(scheme, {"w": tensors}).version == said


def test_version_1_cuts_a_zero_of_0_and_cannot_write_it():
  tensors, want = random_tensors(4, 2, zero=0)
  cut = tensors | {"qzeros": np.full_like(tensors["qzeros"], -1)}
  w = read(cut, 4, 1, symmetric=False)
  np.testing.assert_array_equal(w.dense(), want)
  with pytest.raises(UserError, match="zero does not fit: found 0"):
    gptq.to_tensors(integers(w, "w"), 1)
  same(gptq.to_tensors(integers(w, "w"), 2), tensors)
  writer = writers.Gptq(version=1)
  assert writer.settle([writer.look(w, "w")], []).version == 2


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
  same(awq.to_tensors(integers(w, "w")), tensors)


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
  np.testing.assert_allclose(w.plain().dense(), want.T, rtol=3e-7)
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
  found = integers(w, "w")
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


# What does not fit -----------------------------------------------------------


def packed(**changes):
  x = rng().standard_normal((I, O)).astype(np.float32)
  return qtensor.pack(x, Affine(**dict(block=GROUP) | changes))


@pytest.mark.parametrize(
  ("w", "message"),
  [
    (
      lambda: packed(zero="float"),
      "zero does not fit: found not all are",
    ),
    (
      lambda: packed(scale_dtype="float32"),
      "scale does not fit: found float",
    ),
    (lambda: packed(bits=5), "bits does not fit: found 5, expected one of 2"),
    (
      lambda: qtensor.pack(np.ones((I, O), np.float32), Codebook()),
      "codebook does not fit: found .*nf4",
    ),
    (
      lambda: qtensor.pack(np.ones((I, O), np.float32), GGML(kind="Q4_1")),
      "offset does not fit: found Q4_1",
    ),
    (lambda: qtensor.pack(np.ones((I, 12), "f4"), Affine()), "shape does not"),
    (
      lambda: qtensor.pack(np.ones((2, I, O), np.float32), Affine()),
      "axis does not fit",
    ),
  ],
)
def test_what_gptq_cannot_hold(w, message):
  with pytest.raises(UserError, match=message):
    writers.Gptq().look(w(), "w")


def test_what_others_cannot_hold():
  tensors, _ = random_tensors(4, 2, ordered=False)
  scattered = read(tensors, 4, 2, symmetric=False)
  with pytest.raises(UserError, match="order does not fit: found groups of"):
    writers.Awq().look(scattered, "w")
  with pytest.raises(UserError, match="bits does not fit: found 8, expected 4"):
    writers.Awq().look(packed(bits=8), "w")
  with pytest.raises(UserError, match="format does not fit: found int4"):
    writers.Bnb().look(packed(), "w")
  with pytest.raises(UserError, match="order does not fit"):
    writers.Bnb().look(scattered, "w")


def test_most_matrices_decide():
  writer = writers.Gptq()
  found = [writer.look(packed(block=b), "w") for b in (32, 32, 64)]
  scheme = writer.settle(found, [])
  assert (scheme.bits, scheme.group, scheme.symmetric) == (4, 32, False)
  assert not writer.differs(found[0], scheme)
  assert "found 4 and 64, expected 4 and 32" in writer.differs(found[2], scheme)
  # Groups of 64 are all 64 inputs: either says it.
  assert writer.settle(found[2:], []).group == 0
  assert writer.settle([], [576, 1536]).group == 64
  assert writers.Gptq(group=64).settle(found, []).group == 64
  assert writers.Gptq(group=16).settle(found, [96]).group == 16
  # Of rounded matrices some zero may be 0.
  assert writer.settle(found[:2], [64]).version == 2
  assert writer.settle([], [40]) == gptq.Scheme(group=0)


# Damage ----------------------------------------------------------------------


def changed(**changes):
  tensors, _ = random_tensors(4, 1)
  tensors |= changes
  return {k: x for k, x in tensors.items() if x is not None}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(qweight=np.zeros((8, 0), np.int32)), "qweight has shape"),
    (dict(qweight=np.zeros(8, np.int32)), "qweight has shape"),
    (dict(qweight=np.zeros((8, 32), np.float32)), "qweight is float32"),
    (dict(qweight=np.zeros((9, 32), np.int32)), "32 outputs of 72 inputs"),
    (dict(qweight=np.zeros((8, 31), np.int32)), "31 outputs of 64 inputs"),
    (dict(qzeros=np.zeros((2, 3), np.int32)), r"qzeros is int32 \[2, 3\]"),
    (dict(qzeros=None), "qzeros is missing"),
    (
      dict(scales=np.zeros((1, 32), np.float16)),
      r"scales is .* \[1, 32\]",
    ),
    (dict(g_idx=np.zeros(64, np.int32)), "g_idx does not give each of 2"),
    (dict(g_idx=np.full(64, -1, np.int32)), "g_idx does not give each of 2"),
    (dict(g_idx=np.full(64, 2**31 - 1, np.int32)), "g_idx does not give"),
    (dict(g_idx=np.zeros(63, np.int32)), r"g_idx is int32 \[63\]"),
  ],
)
def test_damaged_tensors_of_gptq(changes, message):
  with pytest.raises(UserError, match=message):
    read(changed(**changes), 4, 1, symmetric=False)


def test_other_damage_of_gptq():
  with pytest.raises(UserError, match="g_idx is missing, which desc_act needs"):
    read(changed(g_idx=None), 4, 1, act_order=True)
  with pytest.raises(UserError, match="qzeros differ, expected one middle"):
    read(changed(), 4, 1)
  tensors, _ = random_tensors(4, 2, zero=3)
  with pytest.raises(UserError, match="qzeros has 3, expected 7 .* or 8"):
    gptq.detected(gptq.Scheme(group=GROUP), {"w": tensors})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(bits=5), "bits is 5, expected one of 2, 3, 4, 8"),
    (dict(group_size=0), "group_size is 0"),
    (dict(group_size="128"), "group_size is '128'"),
    (dict(sym=1), "sym is 1, expected true or false"),
    (
      dict(checkpoint_format="marlin"),
      "'marlin', expected one of gptq,",
    ),
    (dict(checkpoint_format=["gptq"]), "checkpoint_format is"),
    (dict(dynamic={"-:x": {}}), "dynamic is .*not supported"),
    (dict(pack_dtype="int16"), "pack_dtype is 'int16'"),
  ],
)
def test_mistakes_in_the_config_of_gptq(changes, message):
  said = gptq.config(gptq.Scheme(group=32, version=2, act_order=True))
  scheme = gptq.parse(said, "c")
  assert scheme == gptq.Scheme(group=32, version=2, act_order=True)
  with pytest.raises(UserError, match=message):
    gptq.parse(said | changes, "c")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(bits=8), "bits is 8, expected 4"),
    (dict(version="marlin"), "version is 'marlin', expected 'gemm' or"),
    (dict(zero_point=False), "zero_point is False, expected true"),
    (dict(group_size=-2), "group_size is -2"),
  ],
)
def test_mistakes_in_the_config_of_awq(changes, message):
  said = awq.config(awq.Scheme(group=0))
  assert awq.parse(said, "c") == awq.Scheme(group=0)
  with pytest.raises(UserError, match=message):
    awq.parse(said | changes, "c")
  old = {"w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": True}
  assert awq.parse(old, "c") == awq.Scheme(group=64)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(qweight=np.zeros((64, 0), np.int32)), "qweight is int32"),
    (dict(qweight=np.zeros((60, 4), np.int32)), "multiple of the group of 32"),
    (dict(qzeros=np.zeros((2, 4), np.int64)), "qzeros is int64"),
    (
      dict(scales=np.zeros((2, 4), np.float16)),
      r"expected .* \[2, 32\]",
    ),
  ],
)
def test_damaged_tensors_of_awq(changes, message):
  tensors = {
    "qweight": np.zeros((I, O // 8), np.int32),
    "qzeros": np.zeros((2, O // 8), np.int32),
    "scales": np.ones((2, O), np.float16),
  }
  with pytest.raises(UserError, match=message):
    awq.from_tensors(tensors | changes, awq.Scheme(group=GROUP))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(weight=np.zeros((4, 8), np.uint8)), "weight is uint8"),
    (dict(weight=np.zeros(8, np.int8)), "weight is int8"),
    (dict(SCB=np.ones(3, np.float32)), "SCB is float32"),
    (dict(weight_format=np.ones((), np.uint8)), "weight_format is 1, expected"),
  ],
)
def test_damaged_tensors_of_int8(changes, message):
  tensors = dict(weight=np.zeros((4, 8), np.int8), SCB=np.ones(4, np.float32))
  with pytest.raises(UserError, match=message):
    bnb.from_tensors(tensors | changes)


@pytest.mark.parametrize(
  ("said", "message"),
  [
    (dict(), "load_in_4bit is None, expected it or load_in_8bit"),
    (dict(load_in_4bit=True, load_in_8bit=True), "load_in_4bit is True"),
    (dict(load_in_4bit=True, bnb_4bit_quant_type="nf3"), "quant_type is 'nf3'"),
  ],
)
def test_mistakes_in_the_config_of_bitsandbytes(said, message):
  with pytest.raises(UserError, match=message):
    bnb.parse(said, "c")
  assert bnb.parse(bnb.config("int8", False, "float32"), "c") == 8
  assert bnb.parse(bnb.config("fp4", True, "float32"), "c") == 4


def test_codes_too_wide_are_not_packed():
  with pytest.raises(UserError, match="expected 2 bits"):
    bitstream.pack(np.full((16, 1), 4, np.uint8), 2)
