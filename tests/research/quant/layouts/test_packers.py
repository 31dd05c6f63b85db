"""Tests GPTQ's and AWQ's words against auto-gptq's and autoawq's packers."""

import json
import pathlib

import numpy as np
import pytest

from research.interop.quantized import awq, gptq
from research.interop.quantized.integers import to_integers
from research.quant import qtensor

GROUP = 32
CASES = json.loads(
  (pathlib.Path(__file__).parents[3] / "golden" / "packers.json").read_text()
)
every = pytest.mark.parametrize(
  "case",
  CASES,
  ids=[f"{c['tool']}{c['bits']}{'' if c['ordered'] else 'o'}" for c in CASES],
)


def array(found):
  dtype, shape, text = found
  return np.frombuffer(bytes.fromhex(text), dtype).reshape(shape)


def arrays(found):
  return {name: array(x) for name, x in found.items()}


def opened(case):
  tensors = arrays(case["tensors"])
  if case["tool"] == "gptq":
    scheme = gptq.Scheme(bits=case["bits"], group=GROUP, symmetric=False)
    return gptq.from_tensors(tensors, scheme)
  return awq.from_tensors(
    tensors, awq.Scheme(group=GROUP, version=case["tool"])
  )


def stands_for(case):
  """Returns `[in, out]` of the drawn codes, zeros and scales, float32."""
  drawn, tensors = arrays(case["drawn"]), arrays(case["tensors"])
  scale = tensors["scales"].astype(np.float32)
  if case["tool"] == "gemv":  # filled up to whole words of zeros
    scale = scale.T[: len(drawn["zeros"])]
  group = tensors.get("g_idx", np.arange(64) // GROUP)
  zero = drawn["zeros"].astype(np.float32)
  return scale[group] * (drawn["codes"] - zero[group])


@every
def test_their_words_are_read_as_they_were_drawn(case):
  w = opened(case)
  assert (w.order is None) == case["ordered"]
  np.testing.assert_array_equal(w.dense(), stands_for(case))
  if case["dense"] is not None:  # their decoder's, in float16
    got = np.asarray(w.dense(), np.float16)
    np.testing.assert_array_equal(got, array(case["dense"]))


@every
def test_what_we_write_is_what_they_pack(case):
  if case["tool"] == "gemv":
    pytest.skip("only gemm is written")
  w = opened(case)
  # By way of codes and grids, not of the words that were read.
  assert isinstance(w, qtensor.QTensor)
  found = to_integers(w, "w")
  got = (
    gptq.to_tensors(found, 1)
    if case["tool"] == "gptq"
    else awq.to_tensors(found)
  )
  want = arrays(case["tensors"])
  assert set(got) == set(want)
  for name, x in want.items():
    assert got[name].dtype == x.dtype, name
    np.testing.assert_array_equal(got[name], x, name)


def test_the_golden_has_every_width_and_order():
  found = {(c["tool"], c["bits"], c["ordered"]) for c in CASES}
  widths = {("gptq", b, o) for b in (2, 3, 4, 8) for o in (True, False)}
  assert found == widths | {("gemm", 4, True), ("gemv", 4, True)}
