"""Quantized directories that are damaged, or cannot become what is asked."""

import functools
import shutil

import chex
import jax
import numpy as np
import pytest

from research import tree
from research.interop import convert, load, quantized, sources
from research.interop.quantized import checkpoint_formats, gptq
from research.io import safetensors
from research.typing import UserError
from tests import support_lora
from tests.research.interop.test_convert import MODELS
from tests.support_hf_quant import (
  change,
  source,
)


def test_what_does_not_fit_is_refused_or_rounded(made, tmp_path):
  before = sources.open_source(made("nf4", True))
  with pytest.raises(UserError, match="(?s)14 of 14.*codebook .*--requantize"):
    convert.to_quantized(before, tmp_path / "a", checkpoint_formats.Gptq())
  log = convert.to_quantized(
    before, tmp_path / "a", checkpoint_formats.Gptq(), True
  )
  changed = [c for c in log.changes if c.before != c.after]
  assert len(changed) == 14
  assert all(c.before == "nf4-b64-dq" for c in changed)
  assert all(0.01 < c.relative_error < 0.2 for c in changed)
  with pytest.raises(UserError, match="bits and group do not fit: found 8"):
    convert.to_quantized(
      sources.open_source(made("gptq8", True)),
      tmp_path / "b",
      checkpoint_formats.Gptq(bits=4),
    )


def test_configs_in_files_of_their_own(made, tmp_path):
  folder = tmp_path / "old"
  shutil.copytree(made("gptq"), folder)
  config = safetensors.read_json(folder / "config.json")
  said = config.pop(quantized.CONFIG)
  safetensors.write_json(folder / "config.json", config)
  del said["quant_method"]
  safetensors.write_json(folder / "quantize_config.json", said)
  got, want = load.load_model(folder), load.load_model(made("gptq"))
  chex.assert_trees_all_equal(got.params, want.params)


def test_a_label_that_lies_is_found_out(made, tmp_path):
  folder = change(made("gptq"), tmp_path / "lies", checkpoint_format="gptq_v2")
  it = load.load_model(folder)
  chex.assert_trees_all_equal(it.params, load.load_model(made("gptq")).params)
  assert it.source["quantization"]["checkpoint_format"] == "gptq"


def test_biases_of_nothing_are_left_out(made, tmp_path):
  module = "model.layers.1.self_attn.k_proj"

  def edit(value, tensors):
    tensors[f"{module}.bias"] = np.full(32, value, np.float16)

  zero = change(made("gptq"), tmp_path / "0", functools.partial(edit, 0))
  want = load.load_model(made("gptq")).params
  chex.assert_trees_all_equal(load.load_model(zero).params, want)
  one = change(made("gptq"), tmp_path / "1", functools.partial(edit, 1))
  with pytest.raises(UserError, match="superfluous: model.layers.1.*k_proj.b"):
    load.load_model(one)


def cut(tensors):
  name = "model.layers.0.mlp.up_proj.qweight"
  tensors[name] = tensors[name][:-1]


def both(tensors):
  name = "model.layers.0.mlp.up_proj.weight"
  tensors[name] = np.zeros((96, 64), np.float32)


def transposed(tensors):
  for name in gptq.NAMES:
    a, b = (f"model.layers.0.mlp.{x}_proj.{name}" for x in ("up", "down"))
    tensors[a], tensors[b] = tensors[b], tensors[a]


@pytest.mark.parametrize(
  ("edit", "config", "message"),
  [
    (
      None,
      dict(quant_method="quip"),
      "quant_method is 'quip', expected one of",
    ),
    (None, dict(quant_method=None), "quant_method is None"),
    (
      None,
      dict(quant_method="awq", checkpoint_format="gemm", desc_act=False),
      "layers.0.mlp.down_proj: 12 inputs are no",
    ),
    (None, dict(bits=8), "down_proj: 64 outputs of 48 inputs"),
    (
      None,
      dict(group_size=48),
      r"down_proj: qzeros is int32 \[3, 8\]",
    ),
    (cut, {}, "up_proj: .* inputs in whole groups of 32"),
    (both, {}, "up_proj.weight is there both packed and plain"),
    (
      transposed,
      {},
      r"down_proj.weight has shape \[96, 64\], expected \[64, 96\]",
    ),
  ],
)
def test_damaged_directories(edit, config, message, made, tmp_path):
  folder = change(made("gptq"), tmp_path / "bad", edit, **config)
  with pytest.raises(UserError, match=message):
    load.load_model(folder)


def test_a_config_that_is_no_object(made, tmp_path):
  folder = change(made("gptq"), tmp_path / "bad")
  said = safetensors.read_json(folder / "config.json")
  said[quantized.CONFIG] = ["gptq"]
  safetensors.write_json(folder / "config.json", said)
  with pytest.raises(UserError, match="expected an object"):
    load.load_model(folder)


def test_packed_needs_something_packed():
  with pytest.raises(UserError, match="that a tool has quantized"):
    load.load_model(MODELS / "llama", packed=True)


def test_updates_that_rounding_would_eat_are_refused(made, tmp_path):
  it = load.load_model(made("gptq", True))
  params = support_lora.adapting(rank=2)(it.params, jax.random.key(0))
  # An update a hundredth of the step between codes.
  params = tree.map_paths(
    lambda path, x: x + 1e-3 if path.endswith("trained/b") else x, params
  )
  before = source(it.model, params)
  with pytest.raises(UserError, match="14 of 14.*under .* an adapter"):
    convert.to_quantized(before, tmp_path / "q", checkpoint_formats.Gptq())
  with pytest.raises(UserError, match="of the adapter's update would be left"):
    convert.to_quantized(
      before, tmp_path / "q", checkpoint_formats.Gptq(group=32), True, least=0.9
    )
  assert not (tmp_path / "q").exists()
