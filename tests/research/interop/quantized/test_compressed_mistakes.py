"""compressed-tensors' configs, tensors and matrices that do not fit."""

import copy
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from research.interop.quantized import compressed_config as config
from research.interop.quantized import compressed_tensors
from research.quant import qtensor
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.fp8 import FP8
from research.quant.formats.microscaling import Microscaling
from research.typing import UserError
from tests.research.interop.quantized.test_compressed_tensors import (
  group,
  scheme,
  tensors,
  whole,
)


def weights(**more):
  found = group("int4")
  return whole(found | {"weights": found["weights"] | more})


BAD_CONFIGS = {
  "another method": (
    whole() | {"quant_method": "gptq"},
    "quant_method is 'gptq'",
  ),
  "ModelOpt": (whole() | {"quant_method": "modelopt"}, "reciprocal"),
  "no groups": (whole(), "config_groups is"),
  "an unknown field": (whole(group("int4"), rotation=1), "'rotation' is not"),
  "an unknown field of weights": (weights(round_up=1), "'round_up' is not"),
  "rotations": (
    whole(group("int4"), transform_config={"config_groups": {"a": 1}}),
    "transform_config",
  ),
  "sparsity": (
    whole(group("int4"), sparsity_config={"format": "sparse-24"}),
    "sparse",
  ),
  "uncompressed": (
    whole(group("int4"), quantization_status="frozen"),
    "quantization_status is 'frozen', expected 'compressed'",
  ),
  "an unknown format": (
    whole(group("int4") | {"format": "marlin-24"}),
    "format is 'marlin-24'",
  ),
  "no format": (
    whole(group("int4") | {"format": None}),
    "names no format",
  ),
  "an unknown strategy": (weights(strategy="token"), "strategy is 'token'"),
  "a strategy of another format": (
    weights(strategy="block", block_structure=[4, 4], group_size=None),
    "tensor or channel or group in pack-quantized",
  ),
  "a type of another format": (weights(type="float"), "type is 'float'"),
  "bits": (weights(num_bits=16), "num_bits is 16"),
  "one bit": (weights(num_bits=1), "num_bits is 1"),
  "a group of no size": (weights(group_size=0), "group_size is 0"),
  "a group of text": (weights(group_size="128"), "group_size is '128'"),
  "no symmetry": (weights(symmetric="yes"), "symmetric is 'yes'"),
  "dynamic weights": (weights(dynamic=True), "dynamic is True"),
  "an order": (weights(actorder="random"), "actorder is 'random'"),
  "targets": (whole(group("int4") | {"targets": "Linear"}), "a list of names"),
  "an expression": (
    whole(group("int4") | {"targets": ["re:("]}),
    "no regular expression",
  ),
  "no weights": (whole(group("int4") | {"weights": None}), "weights is None"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_configs_refused(name):
  values, match = BAD_CONFIGS[name]
  with pytest.raises(UserError, match=match) as caught:
    config.parse(values, "config.json")
  assert "config.json" in str(caught.value)


# Tensors that are not what they should be ------------------------------------


def changed(name, part, f):
  given = tensors(name)
  given[part] = f(copy.copy(given[part]))
  return given


def put(at, value):
  def f(x):
    x = x.copy()
    x[at] = value
    return x

  return f


BAD = {
  "missing": (
    "int4",
    lambda t: t.pop("weight_scale"),
    "weight_scale is missing",
  ),
  "unknown": (
    "int4",
    lambda t: t.update(weight_x=1),
    "weight_x is not a tensor",
  ),
  "ModelOpt's": ("nvfp4", lambda t: t.update(weight_scale_2=1), "ModelOpt"),
  "zero points of a symmetric one": (
    "int4",
    lambda t: t.update(weight_zero_point=np.ones(3)),
    "weight_zero_point is not a tensor",
  ),
}
CHANGED = {
  "a shape that lies": (
    "int4",
    "weight_shape",
    put(1, 128),
    "weight_packed is",
  ),
  "a huge shape": ("int4", "weight_shape", put(1, 2**60), "weight_shape says"),
  "a negative shape": (
    "int4",
    "weight_shape",
    put(0, -12),
    "weight_shape says",
  ),
  "a longer shape": (
    "int4",
    "weight_shape",
    lambda x: np.append(x, 1),
    "weight_shape is",
  ),
  "words of another type": (
    "int4",
    "weight_packed",
    lambda x: x.view(np.float32),
    "expected int32",
  ),
  "too few scales": (
    "int4",
    "weight_scale",
    lambda x: x[:, :1],
    r"expected \[12, 2\]",
  ),
  "infinite scales": (
    "int4",
    "weight_scale",
    put((0, 0), np.inf),
    "not finite",
  ),
  "scales that are no numbers": (
    "nvfp4",
    "weight_scale",
    lambda x: put((0, 0), 0x7F)(x.view(np.uint8)).view(x.dtype),
    "not finite",
  ),
  "negative scales": ("fp8_channel", "weight_scale", lambda x: -x, "negative"),
  "too few zeros": (
    "int4_asym",
    "weight_zero_point",
    lambda x: x[:1],
    "weight_zero_point is",
  ),
  "codes out of range": (
    "int8_channel",
    "weight",
    lambda x: x.astype(np.int16),
    "expected int8",
  ),
  "no numbers": (
    "fp8_tensor",
    "weight",
    lambda x: put((0, 0), 0xFF)(x.view(np.uint8)).view(x.dtype),
    "not numbers",
  ),
  "a tile too many": (
    "fp8_block",
    "weight_scale",
    lambda x: x[:2],
    r"expected \[3, 3\]",
  ),
  "the reciprocal": (
    "nvfp4",
    "weight_global_scale",
    lambda x: 1 / x,
    "looks like the reciprocal",
  ),
  "bytes cut short": (
    "nvfp4",
    "weight_packed",
    lambda x: x[:, :62],
    "whole groups",
  ),
  "fewer inputs than scales": (
    "mxfp4",
    "weight_packed",
    lambda x: x[:, :16],
    "weight_scale is",
  ),
  "no matrix": ("mxfp8", "weight", lambda x: x[0], "expected a matrix"),
  "the exponent of NaN": (
    "mxfp4",
    "weight_scale",
    put((0, 0), 255),
    "no number",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_tensors_refused(name):
  case, change, match = BAD[name]
  given = tensors(case)
  change(given)
  with pytest.raises(UserError, match=match) as caught:
    compressed_tensors.from_tensors(given, scheme(case), "model.layers.0.x")
  assert "model.layers.0.x" in str(caught.value)


@pytest.mark.parametrize("name", CHANGED)
def test_changed_tensors_refused(name):
  case, part, f, match = CHANGED[name]
  with pytest.raises(UserError, match=match):
    compressed_tensors.from_tensors(changed(case, part, f), scheme(case), "x")


def test_what_rounds_activations_is_left_and_old_zeros_too():
  given = tensors("int4") | {
    "input_scale": np.ones(1, np.float32),
    "weight_zero_point": np.zeros((12, 2), np.int8),
  }
  got = compressed_tensors.from_tensors(given, scheme("int4")).dense()
  want = compressed_tensors.from_tensors(
    tensors("int4"), scheme("int4")
  ).dense()
  np.testing.assert_array_equal(got, want)


def test_codes_of_fewer_bits_than_said():
  told = dataclasses.replace(scheme("int8_channel"), bits=4)
  with pytest.raises(UserError, match="expected those of 4 bits"):
    compressed_tensors.from_tensors(tensors("int8_channel"), told)


@pytest.mark.parametrize(
  "format, match",
  [
    (Codebook(), "nf4-b64-dq as it is does not fit"),
    (Affine(zero="float"), "zeros that are no integers"),
    (FP8(element="e5m2"), "does not fit"),
    (Microscaling(element="int8"), "mxint8 as it is does not fit"),
  ],
  ids=lambda x: getattr(x, "name", None),
)
@pytest.mark.sample(4)
def test_what_it_cannot_hold_is_not_written(format, match):
  w = qtensor.pack(jnp.ones((64, 8)), format)
  with pytest.raises(UserError, match=match):
    compressed_tensors.to_tensors(w)


def test_outliers_and_stacks_are_not_written():
  w = qtensor.pack(jnp.ones((64, 8)), Affine(symmetric=True))
  rows = {"rows": jnp.zeros(1, jnp.int32), "values": jnp.ones((1, 8))}
  with pytest.raises(UserError, match="outliers"):
    compressed_tensors.to_tensors(dataclasses.replace(w, outliers=rows))
  with pytest.raises(UserError, match="expected one matrix"):
    compressed_tensors.to_tensors(qtensor.pack(jnp.ones((2, 64, 8)), Affine()))
  told = dataclasses.replace(
    compressed_tensors.scheme_of(w), strategy="tensor", group=None
  )
  mixed = qtensor.pack(
    jnp.ones((64, 8)).at[0, 0].set(3), Affine(symmetric=True)
  )
  with pytest.raises(UserError, match="differs within the matrix"):
    compressed_tensors.to_tensors(mixed, told)
