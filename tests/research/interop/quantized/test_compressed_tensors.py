"""compressed-tensors' checkpoints: its bytes, read and written."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from research.interop.quantized import compressed_config as config
from research.interop.quantized import compressed_tensors
from research.quant import qtensor
from research.quant.formats.affine import Affine
from research.quant.formats.fp8 import FP8
from research.quant.formats.microscaling import Microscaling
from research.quant.formats.nvfp4 import NVFP4
from research.typing import UserError

GOLDEN = json.loads(
  (pathlib.Path(__file__).parents[3] / "golden" / "compressed.json").read_text()
)["checkpoints"]
cases = pytest.mark.parametrize("name", GOLDEN)


def array(found):
  dtype, shape, raw = found
  dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
  return np.frombuffer(bytes.fromhex(raw), dtype).reshape(shape)


def matrix(name):
  """Returns `[inputs, outputs]`; the rule of make_compressed.py."""
  outputs, inputs, dtype = GOLDEN[name]["case"]
  t = np.arange(outputs * inputs, dtype=np.float64)
  x = np.sin(0.7 * t + 0.3) * (0.5 + (37 * t % 101) / 101)
  return jnp.asarray(x.astype(np.float32).reshape(outputs, inputs).T, dtype)


def tensors(name):
  return {k: array(x) for k, x in GOLDEN[name]["tensors"].items()}


def whole(*groups, **more):
  """Returns a whole quantization_config, as its package writes one."""
  return {
    "quant_method": "compressed-tensors",
    "version": "0.20.0",
    "format": "mixed-precision",
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
    "kv_cache_scheme": None,
    "global_compression_ratio": None,
    "ignore": ["lm_head"],
    "config_groups": {f"group_{i}": g for i, g in enumerate(groups)},
  } | more


def group(name):
  return GOLDEN[name]["scheme"] | {"format": GOLDEN[name]["format"]}


def scheme(name):
  return config.parse(whole(group(name)), "config").groups[0][1]


def same(got, want):
  assert set(got) == set(want)
  for key, x in want.items():
    assert (got[key].dtype, got[key].shape) == (x.dtype, x.shape), key
    assert got[key].tobytes() == x.tobytes(), key


@cases
def test_read_bitwise_and_written_back(name):
  of = "bfloat16" if name == "nvfp4" else None  # as its package decodes it
  w = compressed_tensors.from_tensors(tensors(name), scheme(name), name, of)
  outputs, inputs = GOLDEN[name]["case"][:2]
  assert w.shape == (inputs, outputs)
  got = np.asarray(jax.jit(qtensor.QTensor.dense)(w), np.float32)
  np.testing.assert_array_equal(got.T, array(GOLDEN[name]["dense"]))
  same(compressed_tensors.to_tensors(w, scheme(name)), tensors(name))


# In float32: in bfloat16 it divides in bfloat16, rounding twice.
OURS = {
  **{
    n: Affine(bits=int(n[3]), block=32, symmetric=True)
    for n in GOLDEN
    if n in {f"int{b}" for b in range(2, 9)}
  },
  "w4a16": Affine(block=128, symmetric=True),
  "fp8_tensor": FP8(share="tensor"),
  "fp8_block": FP8(share="tile", tile_inputs=16, tile_outputs=4),
  "nvfp4": NVFP4(),
  "mxfp4": Microscaling(),
  "mxfp4_bf16": Microscaling(),
  "mxfp6": Microscaling(element="e2m3"),
}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.sample(3)
def test_our_own_codes_are_its_bytes(name):
  format = OURS[name]
  if isinstance(format, Affine):
    format = dataclasses.replace(format, scale_dtype="float32")
  w = jax.jit(lambda w: qtensor.pack(w, format))(matrix(name))
  own = compressed_tensors.scheme_of(w)
  expected = dataclasses.replace(scheme(name), activations=None)
  if name != "w4a16":  # one group is all inputs
    assert own == expected
  same(compressed_tensors.to_tensors(w, own), tensors(name))


def test_the_published_vector():
  w = tensors("w4a16")
  np.testing.assert_allclose(
    w["weight_scale"][:, 0], [0.19613416, 0.19308914], rtol=1e-7
  )
  words = w["weight_packed"].view(np.uint32)[0, :4]
  assert list(words) == [0x3548AEC9, 0x368BBD95, 0x58CCEA72, 0x8DEBA652]
  w = tensors("nvfp4")
  assert w["weight_global_scale"][0] == pytest.approx(1827.32056, rel=1e-8)
  scales = w["weight_scale"].astype(np.float32)[0]
  assert list(scales) == [384, 384, 416, 448, 384, 416, 416, 384]
  first = w["weight_packed"].reshape(-1)[:16].tobytes().hex()
  assert first == "5147e0ed2d4605ecaf7366d0df4b7586"
  packed = qtensor.pack(matrix("nvfp4"), NVFP4())
  error = np.sqrt(np.mean((packed.dense() - matrix("nvfp4")) ** 2))
  assert error == pytest.approx(0.072696, rel=1e-4)


def test_groups_of_scattered_inputs():
  """Each input's own group, whichever neighbours it has: by the definition."""
  given, told = tensors("int4_asym"), scheme("int4_asym")
  told = dataclasses.replace(told, act_order=True)
  inputs = GOLDEN["int4_asym"]["case"][1]
  index = np.random.default_rng(0).permutation(np.arange(inputs) // 32)
  given["weight_g_idx"] = index.astype(np.int32)
  w = compressed_tensors.from_tensors(given, told)
  plain = compressed_tensors.from_tensors(
    tensors("int4_asym"), scheme("int4_asym")
  ).normal_form()
  codes = np.asarray(plain.codes, np.float32)
  want = (codes - np.asarray(plain.zero)[index]) * np.asarray(plain.scale)[
    index
  ]
  np.testing.assert_array_equal(w.dense(), want)
  assert compressed_tensors.scheme_of(w) == told
  same(compressed_tensors.to_tensors(w), given)
  for index in (np.full(inputs, -1), np.arange(inputs) // 32):
    given["weight_g_idx"] = index.astype(np.int32)
    w = compressed_tensors.from_tensors(given, told)
    assert w.order is None
  codes = given["weight_g_idx"].copy()
  for value in (-1, 2**31 - 1, 0):
    codes[40] = value
    with pytest.raises(UserError, match="weight_g_idx does not give each"):
      compressed_tensors.from_tensors(given | {"weight_g_idx": codes}, told)


# Configs ---------------------------------------------------------------------


def test_which_module_is_kept_how():
  attention = group("int8") | {"targets": ["re:.*self_attn.*"]}
  mlp = group("nvfp4") | {"targets": ["model.layers.0.mlp.up_proj", "Linear"]}
  found = config.parse(
    whole(attention, mlp, ignore=["lm_head", "re:.*layers\\.1\\..*o_proj"]), "c"
  )
  bits = {
    "model.layers.1.self_attn.q_proj": 8,
    "model.layers.1.self_attn.o_proj": None,
    "model.layers.0.mlp.up_proj": 4,
    "model.layers.0.mlp.down_proj": 4,
    "lm_head": None,
  }
  for name, want in bits.items():
    scheme = found.scheme(name)
    assert (scheme and scheme.bits) == want, name
  assert found.scheme("model.embed_tokens", "Embedding") is None


def test_the_most_specific_target_wins():
  """The order of `match_targets` in its `utils/match.py`; groups have none."""
  targets = ["Linear", "re:.*mlp.*", "re:.*down.*", "layers.1.mlp.down_proj"]
  names = ["int8", "int4", "nvfp4", "int8"]
  groups = [
    group(name) | {"targets": [target]}
    for name, target in zip(names, targets, strict=True)
  ]
  for given in (groups, groups[::-1]):
    found = config.parse(whole(*given), "c")
    for module, want in {
      "layers.0.self_attn.q_proj": "int8",
      "layers.0.mlp.up_proj": "int4",
      "layers.0.mlp.down_proj": "nvfp4",
      "layers.1.mlp.down_proj": "int8",
    }.items():
      assert found.scheme(module) == scheme(want), module


@cases
def test_configs_come_back(name):
  one = dataclasses.replace(scheme(name), activations=None)
  made = config.write({"a": one, "b": one}, ["lm_head"])
  read = config.parse(json.loads(json.dumps(made)), "config")
  assert read.groups == ((("Linear",), one),)
  assert read.ignore == ("lm_head",)


def test_configs_of_unlike_modules_come_back():
  schemes = {"a.b": scheme("int4"), "a.c": scheme("mxfp4"), "d": scheme("int4")}
  read = config.parse(config.write(schemes), "config")
  assert {name: read.scheme(name) for name in schemes} == schemes
  assert read.scheme("e") is None
  with pytest.raises(UserError, match="no module is quantized"):
    config.write({})
