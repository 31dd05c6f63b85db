"""Other tools' tensors that are damaged, and matrices that do not fit them."""

import numpy as np
import pytest

from research.interop.quantized import (
  awq,
  bnb,
  checkpoint_formats,
  compressed_config,
  gptq,
)
from research.quant import qtensor
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.ggml import GGML
from research.quant.layouts import bitstream
from research.typing import UserError
from tests.research.interop.quantized.test_checkpoints import (
  GROUP,
  I,
  O,
  random_tensors,
  read,
  rng,
)

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
@pytest.mark.sample(4)
def test_what_gptq_cannot_hold(w, message):
  with pytest.raises(UserError, match=message):
    checkpoint_formats.Gptq().describe(w(), "w")


def test_what_others_cannot_hold():
  tensors, _ = random_tensors(4, 2, ordered=False)
  scattered = read(tensors, 4, 2, symmetric=False)
  with pytest.raises(UserError, match="order does not fit: found groups of"):
    checkpoint_formats.Awq().describe(scattered, "w")
  with pytest.raises(UserError, match="bits does not fit: found 8, expected 4"):
    checkpoint_formats.Awq().describe(packed(bits=8), "w")
  with pytest.raises(UserError, match="format does not fit: found int4"):
    checkpoint_formats.Bnb().describe(packed(), "w")
  with pytest.raises(UserError, match="order does not fit"):
    checkpoint_formats.Bnb().describe(scattered, "w")


def test_most_matrices_decide():
  writer = checkpoint_formats.Gptq()
  found = [writer.describe(packed(block=b), "w") for b in (32, 32, 64)]
  scheme = writer.choose(found, [])
  assert (scheme.bits, scheme.group, scheme.symmetric) == (4, 32, False)
  assert not writer.mismatch(found[0], scheme)
  assert "found 4 and 64, expected 4 and 32" in writer.mismatch(
    found[2], scheme
  )
  # Groups of 64 are all 64 inputs: either says it.
  assert writer.choose(found[2:], []).group == 0
  assert writer.choose([], [576, 1536]).group == 64
  assert checkpoint_formats.Gptq(group=64).choose(found, []).group == 64
  assert checkpoint_formats.Gptq(group=16).choose(found, [96]).group == 16
  # Of rounded matrices some zero may be 0.
  assert writer.choose(found[:2], [64]).version == 2
  assert writer.choose([], [40]) == gptq.Scheme(group=0)


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
    gptq.detect_version(gptq.Scheme(group=GROUP), {"w": tensors})


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
    (dict(zero_point=0), "zero_point is 0, expected true or false"),
    (dict(group_size=-2), "group_size is -2"),
  ],
)
def test_mistakes_in_the_config_of_awq(changes, message):
  said = awq.config(awq.Scheme(group=0))
  assert awq.parse(said, "c") == awq.Scheme(group=0)
  with pytest.raises(UserError, match=message):
    awq.parse(said | changes, "c")
  # gptqmodel says so of symmetric grids, whose zeros it stores all the same.
  symmetric = said | {"zero_point": False}
  assert awq.parse(symmetric, "c") == awq.Scheme(group=0)
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
    (dict(load_in_8bit=True, llm_int8_threshold=-1), "threshold is -1"),
    (dict(load_in_8bit=True, llm_int8_threshold="6"), "threshold is '6'"),
  ],
)
def test_mistakes_in_the_config_of_bitsandbytes(said, message):
  with pytest.raises(UserError, match=message):
    bnb.parse(said, "c")
  for config, scheme in (
    (bnb.config("int8", False, "float32"), bnb.Scheme(8, 6.0)),
    (bnb.config("int8", False, "float32", threshold=2.0), bnb.Scheme(8, 2.0)),
    (bnb.config("fp4", True, "float32"), bnb.Scheme(4)),
  ):
    assert bnb.parse(config, "c") == scheme


@pytest.mark.parametrize(
  ("parse", "said"),
  [
    (gptq.parse, gptq.config(gptq.Scheme(group=32))),
    (awq.parse, awq.config(awq.Scheme())),
    (bnb.parse, bnb.config("nf4", False, "float32")),
    (
      compressed_config.parse,
      compressed_config.write(
        {"w": compressed_config.Scheme("pack-quantized", 4, group=32)}
      ),
    ),
  ],
)
def test_what_a_config_says_is_applied_or_refused_by_name(parse, said):
  parse(said, "c")
  with pytest.raises(UserError, match="c: 'turned' is not understood"):
    parse(said | {"turned": True}, "c")


def test_what_only_made_the_codes_or_places_them_changes_nothing():
  made = dict(damp_percent=0.1, true_sequential=True, meta={"a": 1})
  run = dict(use_exllama=False, backend="auto", modules_to_not_convert=["x"])
  for it in (gptq, awq):
    said = it.config(it.Scheme(group=32))
    assert it.parse(said | made | run, "c") == it.Scheme(group=32)
  said = bnb.config("nf4", False, "float32")
  said |= {f"_{x}": said[x] for x in ("load_in_4bit", "load_in_8bit")}
  said |= {"llm_int8_enable_fp32_cpu_offload": True}
  assert bnb.parse(said, "c") == bnb.Scheme(4)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(format="llm-awq", version=None), "format is 'llm-awq', expected"),
    (dict(format="gemm", version="gemv"), "format is 'gemm', expected 'gemv'"),
    (dict(backend="llm-awq"), "backend is 'llm-awq', expected any other"),
    (dict(desc_act=True), "desc_act is True, expected None or False"),
    (dict(dynamic={"-:x": {}}), "dynamic is .*not supported"),
  ],
)
def test_layouts_of_awq_by_other_fields_are_refused(changes, message):
  """A file without `version` has `format`, as transformers reads it."""
  said = awq.config(awq.Scheme())
  with pytest.raises(UserError, match=message):
    awq.parse(said | changes, "c")
  said.pop("version")
  assert awq.parse(said | dict(format="gemv"), "c").version == "gemv"


def test_codes_too_wide_are_not_packed():
  with pytest.raises(UserError, match="expected 2 bits"):
    bitstream.pack(np.full((16, 1), 4, np.uint8), 2)
