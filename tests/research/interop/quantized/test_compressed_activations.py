"""compressed-tensors' rounding of activations: by its rules, or refused."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from experiments.converting.quantized import BitsAndBytes, CompressedTensors
from research import tree, weights
from research.interop import convert, load, native, quantized, sources
from research.interop.hf import write as hf_write
from research.interop.loaded import NOTE
from research.interop.quantized import compressed_activations
from research.interop.quantized.checkpoint_formats import Bnb, Compressed
from research.io import safetensors
from research.lora.adapt import Adapt
from research.lora.adapted import AdaptedTensor
from research.lora.merge.merge import merge_as
from research.lora.methods.lora import LoRA
from research.quant.activations import InputTensor, Round, RoundFloat
from research.quant.llm_int8 import Outliers
from research.typing import UserError
from tests import support
from tests.support_hf_quant import plain

INT8 = dict(num_bits=8, type="int", symmetric=True, strategy="token")
INT8["dynamic"] = True
FP8 = INT8 | dict(type="float")


def said(*given):
  groups = {
    f"group_{i}": {"targets": ["Linear"], "input_activations": g}
    for i, g in enumerate(given)
  }
  return {"quant_method": "compressed-tensors", "config_groups": groups}


def theirs(x, bits, kind, symmetric, over):
  """Returns what compressed-tensors' `fake_quantize` does, in NumPy.

  `calculate_qparams` and `quantize` of its `quantization/utils/helpers.py`
  and `lifecycle/forward.py`.
  """
  least = np.minimum(x.min(axis=over, keepdims=True), 0)
  most = np.maximum(x.max(axis=over, keepdims=True), 0)
  if kind == "float":
    scale = np.maximum(-least, most) / (448 - -448) * 2
    codes = np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return codes.astype(np.float32) * scale
  low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  if symmetric:
    scale, zero = np.maximum(-least, most) / ((high - low) / 2), 0
  else:
    scale = (most - least) / (high - low)
    zero = np.clip(np.round(low - least / scale), low, high)
  codes = np.clip(np.round(x / scale + zero), low, high)
  return (codes - zero) * scale


@pytest.mark.parametrize("strategy", ["token", "tensor"])
@pytest.mark.parametrize(
  ("kind", "bits", "symmetric"),
  [("int", 8, True), ("int", 4, True), ("int", 8, False), ("float", 8, True)],
)
def test_numbers_are_its_own(kind, bits, symmetric, strategy):
  given = dict(num_bits=bits, type=kind, symmetric=symmetric, dynamic=True)
  op = compressed_activations.op_of(said(given | {"strategy": strategy}), "x")
  x = np.random.default_rng(0).standard_normal((3, 5, 64)).astype(np.float32)
  x[1, 2] *= 30
  over = -1 if strategy == "token" else None
  want = theirs(x, bits, kind, symmetric, over)
  got = np.asarray(jax.jit(op)(jnp.asarray(x)))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("given", "want"),
  [({}, dict(per="tensor")), ({"group_size": 32}, dict(group=32))],
)
def test_a_strategy_that_is_not_given_is_its_own(given, want):
  """As `validate_model_after` of its `quantization/quant_args.py` infers it."""
  given |= dict(num_bits=8, type="int", symmetric=True, dynamic=True)
  op = compressed_activations.op_of(said(given), "x")
  assert op == Round(bits=8, full=True, **want)


def test_gradients_go_straight_through():
  x = jnp.linspace(-2.0, 2.0, 16)[None]
  grad = jax.grad(lambda x: RoundFloat()(x, jnp.float32(0.01)).sum())(x)
  np.testing.assert_allclose(grad, 1.0)
  with pytest.raises(UserError, match="RoundFloat.per: found 'row'"):
    RoundFloat(per="row")


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ([INT8 | {"dynamic": False}], "dynamic is False, .*calibration .*nopacked"),
    ([INT8 | {"dynamic": "local"}], "dynamic is 'local'"),
    ([INT8 | {"strategy": "block"}], "strategy is 'block'"),
    ([FP8 | {"num_bits": 4}], "num_bits is 4, expected 8"),
    ([INT8 | {"num_bits": 16}], "num_bits is 16, expected 2 to 8"),
    ([INT8, None], "alike in all groups"),
  ],
)
def test_others_are_refused_by_name(given, message):
  with pytest.raises(UserError, match=message):
    compressed_activations.op_of(said(*given), "config.json")


def test_a_checkpoint_rounds_what_its_config_says(tmp_path):
  folder = tmp_path / "model"
  convert.to_quantized(plain(True), folder, Compressed(), True)
  want = load.load_model(folder)
  config = safetensors.read_json(folder / "config.json")
  groups = config[quantized.CONFIG]["config_groups"]
  for group in groups.values():
    group["input_activations"] = INT8
  safetensors.write_json(folder / "config.json", config)
  got = load.load_model(folder)
  found = jax.tree.leaves(got.params, is_leaf=weights.is_weight)
  assert sum(isinstance(w, InputTensor) for w in found) == 7
  tokens = support.tokens()

  @jax.jit
  def hidden(params):
    return got.model.apply({"params": params}, tokens)[0]

  one, two = hidden(got.params), hidden(want.params)
  apart = float(jnp.abs(one - two).max() / jnp.abs(two).max())
  assert 1e-4 < apart < 0.2
  # The weights alone.
  wide = [load.load_model(folder, packed=False).params for _ in (0, 1)]
  assert not any(weights.is_weight(w) for w in jax.tree.leaves(wide[0]))
  for group in groups.values():
    group["input_activations"] = INT8 | {"dynamic": False}
  safetensors.write_json(folder / "config.json", config)
  with pytest.raises(UserError, match="calibration are not applied"):
    load.load_model(folder)


def rounding(folder, given):
  """Makes a checkpoint round its inputs, as every group of its config says."""
  config = safetensors.read_json(folder / "config.json")
  for group in config[quantized.CONFIG]["config_groups"].values():
    group["input_activations"] = given
  safetensors.write_json(folder / "config.json", config)


def test_conversions_keep_the_rounding_or_warn(tmp_path):
  """They had written weights alone, and said nothing."""
  folder = tmp_path / "model"
  convert.to_quantized(plain(True), folder, Compressed(), True)
  rounding(folder, FP8)
  source = sources.open_source(folder)
  convert.to_orbax(source, tmp_path / "ours")
  ours = load.load_model(tmp_path / "ours", packed="any").params
  found = jax.tree.leaves(ours, is_leaf=weights.is_weight)
  ops = [w.op for w in found if isinstance(w, InputTensor)]
  assert ops == [RoundFloat()] * 7

  again = CompressedTensors(from_="", to="")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    convert.to_quantized(source, tmp_path / "again", again.tool(source))
  config = safetensors.read_json(tmp_path / "again" / "config.json")
  for group in config[quantized.CONFIG]["config_groups"].values():
    assert group["input_activations"] == FP8
  with pytest.warns(RuntimeWarning, match="rounds activations, which the"):
    convert.to_hf(source, tmp_path / "hf")

  # Scales of a calibration are tensors, which are not read.
  rounding(folder, FP8 | {"dynamic": False})
  source = sources.open_source(folder)
  with pytest.warns(RuntimeWarning, match="rounds activations, which the"):
    convert.to_quantized(source, tmp_path / "last", again.tool(source))
  with pytest.raises(UserError, match="calibration are not applied"):
    convert.to_orbax(source, tmp_path / "none")


def test_eight_bits_of_bitsandbytes_round_inputs(tmp_path):
  """LLM.int8; tests/peers compares the numbers."""
  folder = tmp_path / "model"
  convert.to_quantized(plain(True), folder, Bnb("int8"), True)
  config = safetensors.read_json(folder / "config.json")
  # Older files do not say whose it is.
  del config[quantized.CONFIG]["quant_method"]
  config[quantized.CONFIG]["llm_int8_threshold"] = 2.5
  safetensors.write_json(folder / "config.json", config)

  def ops(params):
    found = jax.tree.leaves(params, is_leaf=weights.is_weight)
    return [w.op for w in found if isinstance(w, InputTensor)]

  assert ops(load.load_model(folder).params) == [Outliers(threshold=2.5)] * 7
  assert not ops(load.load_model(folder, packed=False).params)
  source, to = sources.open_source(folder), tmp_path / "ours"
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    convert.to_orbax(source, to)
    for i, x in enumerate((source, sources.open_source(to))):
      writer = BitsAndBytes(from_="", to="").tool(x)
      convert.to_quantized(x, tmp_path / f"again{i}", writer)
  assert ops(load.load_model(to, packed="any").params) == ops(source.params())
  for i in (0, 1):
    config = safetensors.read_json(tmp_path / f"again{i}" / "config.json")
    assert config[quantized.CONFIG]["llm_int8_threshold"] == 2.5
  with pytest.warns(RuntimeWarning, match="rounds activations, which the"):
    convert.to_hf(source, tmp_path / "hf")


def test_a_quantized_cache_is_refused_by_name(tmp_path):
  """Its scheme was dropped without a word, and so were its scales."""
  folder = tmp_path / "model"
  convert.to_quantized(plain(True), folder, Compressed(), True)
  tensors = {
    k: np.asarray(t.read())
    for k, t in safetensors.open_directory(folder).items()
  }
  want = load.load_model(folder, packed=False).params
  layer = "model.layers.0.self_attn"
  names = (f"{layer}.k_proj.output_scale", f"{layer}.v_scale")
  for name in names:
    safetensors.write_file(
      folder / "model.safetensors",
      tensors | {name: np.ones(1, np.float32)},
    )
    with pytest.raises(UserError, match=name.rpartition(".")[2]):
      load.load_model(folder, packed=False)
  config = safetensors.read_json(folder / "config.json")
  config[quantized.CONFIG]["kv_cache_scheme"] = FP8 | {"dynamic": False}
  safetensors.write_json(folder / "config.json", config)
  with pytest.raises(UserError, match="kv_cache_scheme is .*nopacked"):
    load.load_model(folder)
  got = load.load_model(folder, packed=False).params
  jax.tree.map(np.testing.assert_array_equal, got, want)
  with pytest.warns(RuntimeWarning, match="rounds activations, which the"):
    convert.to_hf(sources.open_source(folder), tmp_path / "hf")


def test_whole_numbers_in_a_note_are_read_as_such(tmp_path):
  """`LoRA(alpha=8)` was written, and what was written could not be read."""
  model, params = plain(True).model, plain(True).params()

  def adapted(path, w):
    if path != "run0/layer0/attention/q":
      return w
    layers, size_in, size_out = w.shape
    factors = {
      "a": jnp.ones((layers, 2, size_in)),
      "b": jnp.ones((layers, 2, size_out)),
    }
    method = LoRA(rank=2, alpha=8.0)
    return AdaptedTensor(InputTensor(w, op=Round()), factors, method=method)

  changed = tree.map_paths(adapted, params, is_leaf=weights.is_weight)
  config = hf_write.config_json(model, None, None)
  native.save(tmp_path, model, changed, config, {})
  note = tmp_path / NOTE
  text = note.read_text().replace("8.0", "8").replace("1.0", "1")
  note.write_text(text)
  assert '"alpha": 8,' in text and '"clip": 1,' in text
  found = native.load(tmp_path)[1]["run0"]["layer0"]["attention"]["q"]
  assert (found.method, found.w.op) == (LoRA(rank=2, alpha=8.0), Round())


def adapter_over(folder, to):
  """Writes an adapter over a quantized directory, in PEFT's format."""
  base = sources.open_source(folder)
  adapted = Adapt(method=LoRA(rank=2, alpha=4.0))(
    base.params(), jax.random.key(0)
  )

  def moved(path, w):
    if not isinstance(w, AdaptedTensor):
      return w
    trained = {k: x + 0.01 for k, x in w.trained.items()}
    return dataclasses.replace(w, trained=trained)

  adapted = tree.map_paths(moved, adapted, is_leaf=weights.is_weight)
  origin = dict(format="train", path=str(to))
  source = sources.with_params(base, base.model, adapted, origin, str(folder))
  convert.to_peft(source, to)


def test_adapters_over_a_rounding_base_are_converted_as_it_is(tmp_path):
  """Merged they had no warning; over scales of a calibration, none opened."""
  folder, adapter = tmp_path / "model", tmp_path / "peft"
  convert.to_quantized(plain(True), folder, Compressed(), True)
  adapter_over(folder, adapter)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    convert.to_hf(sources.open_source(adapter), tmp_path / "want")
  want = safetensors.open_file(tmp_path / "want" / "model.safetensors")

  for name, given in (("token", FP8), ("static", FP8 | {"dynamic": False})):
    rounding(folder, given)
    source = sources.open_source(adapter)
    with pytest.warns(RuntimeWarning, match="rounds activations, which the"):
      convert.to_hf(source, tmp_path / name)
    got = safetensors.open_file(tmp_path / name / "model.safetensors")
    for key, x in want.items():
      np.testing.assert_array_equal(got[key].read(), x.read())
    convert.to_peft(source, tmp_path / f"{name}-peft")
  with pytest.raises(UserError, match="in a way that is not applied"):
    convert.to_orbax(source, tmp_path / "none")


def test_a_merged_base_is_requantized_under_its_rounding(tmp_path):
  """What rounds inputs hid that it is packed, and dense weights came of it."""
  folder, adapter = tmp_path / "model", tmp_path / "peft"
  convert.to_quantized(plain(True), folder, Compressed(), True)
  adapter_over(folder, adapter)
  want = merge_as(sources.open_source(adapter).params(), "requantized")
  rounding(folder, FP8)
  got = merge_as(sources.open_source(adapter).params(), "requantized")
  leaves = [jax.tree.leaves(x, is_leaf=weights.is_weight) for x in (got, want)]
  assert sum(map(weights.is_packed, leaves[1])) == 7
  for now, w in zip(*leaves, strict=True):
    if weights.is_packed(w):
      assert isinstance(now, InputTensor) and now.op == RoundFloat()
      now = now.w
      assert now.format == w.format
    for a, b in zip(*map(jax.tree.leaves, (now, w)), strict=True):
      np.testing.assert_array_equal(a, b)
