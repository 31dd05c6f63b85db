"""Diffusion models' checkpoints: what they compute, and both ways."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from research.diffusion.sampling.denoiser import NoCache
from research.interop import convert, load, sources
from research.interop.diffusion.spec import Spec
from research.interop.hf import llada
from research.nn import presets
from research.typing import UserError

GOLDEN = pathlib.Path(__file__).parents[3] / "golden" / "diffusion"
SPECS = {
  "llada": Spec(mask_id=46, end=(41,)),
  "dream": Spec(mask_id=39, shift=True, end=(38,)),
  "llada_moe": Spec(mask_id=46, end=(41,)),
  "llada2": Spec(mask_id=46, block=4, end=(41,)),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.sample(4)
def test_logits_are_transformers(name):
  """Of all tokens seeing each other; Dream's come from the place before."""
  loaded = load.load_model(GOLDEN / name)
  assert loaded.diffusion == SPECS[name]
  with np.load(GOLDEN / name / "golden.npz") as file:
    golden = dict(file)
  how = loaded.diffusion
  asked = NoCache(model=loaded.model, shift=how.shift, block=how.block)
  got = jax.jit(asked.scores)(
    loaded.params, golden["tokens"], jnp.asarray(golden["positions"] >= 0)
  )
  seen = golden["positions"] >= 0
  if loaded.diffusion.shift:
    seen &= golden["positions"] > 0  # nothing is before a row's first token
  want = golden["logits"][seen]
  # Golden in fp64; two layers of fp32 sums of at most 48 terms.
  np.testing.assert_allclose(
    np.asarray(got)[seen], want, atol=1e-5 * np.ptp(want)
  )


@pytest.mark.parametrize("name", SPECS)
def test_a_checkpoint_comes_back_as_it_was(name, tmp_path):
  convert.to_hf(sources.open_source(GOLDEN / name), tmp_path / "a")
  old, new = (
    safetensors.numpy.load_file(folder / "model.safetensors")
    for folder in (GOLDEN / name, tmp_path / "a")
  )
  assert old.keys() == new.keys()
  for tensor, x in old.items():
    assert x.tobytes() == new[tensor].tobytes() and x.shape == new[tensor].shape
  configs = [
    json.loads((folder / "config.json").read_text())
    for folder in (GOLDEN / name, tmp_path / "a")
  ]
  assert configs[0] == configs[1]


def test_our_checkpoint_keeps_what_is_said_of_masks(tmp_path):
  convert.to_orbax(sources.open_source(GOLDEN / "llada"), tmp_path / "a")
  assert load.load_model(tmp_path / "a").diffusion == SPECS["llada"]


@pytest.mark.slow
def test_another_tools_format_has_llamas_names(tmp_path):
  from research.interop.quantized import checkpoint_formats

  convert.to_quantized(
    sources.open_source(GOLDEN / "llada"),
    tmp_path / "a",
    checkpoint_formats.Gptq(8, 16, 1),
    requantize=True,
  )
  loaded = load.load_model(tmp_path / "a")
  assert loaded.diffusion == SPECS["llada"]
  config = json.loads((tmp_path / "a" / "config.json").read_text())
  assert config["model_type"] == "llama"


def test_the_published_size():
  """The file's own count: 6 shards of 16,031,162,368 bytes in bfloat16."""
  config = dict(
    model_type="llada",
    d_model=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=32,
    mlp_hidden_size=12288,
    vocab_size=126464,
    embedding_size=126464,
    max_sequence_length=4096,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    mask_token_id=126336,
  )
  from research.interop.hf import config as hf_config

  _, sizes = hf_config.sizes_from_config(config)
  assert sizes == presets.LLADA_8B
  model = presets.transformer(presets.FAMILIES["llama"], sizes)
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  )
  count = sum(x.size for x in jax.tree.leaves(shapes))
  assert count == 8_015_581_184


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"d_model": None}, "d_model is None"),
    ({"block_type": "sequential"}, "block_type is 'sequential'"),
    ({"layer_norm_type": "low_precision"}, "layer_norm_type"),
    ({"include_bias": True}, "include_bias is True"),
    ({"include_qkv_bias": True}, "include_qkv_bias is True"),
    ({"scale_logits": True}, "scale_logits is True"),
    ({"mask_token_id": 48}, "mask_token_id is 48, expected at most 47"),
    ({"n_heads": "4"}, "n_heads is '4'"),
  ],
)
def test_what_is_not_supported_is_named(change, message, tmp_path):
  shutil.copytree(GOLDEN / "llada", tmp_path / "a")
  file = tmp_path / "a" / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | change))
  with pytest.raises(UserError, match=message):
    load.load_model(tmp_path / "a")


def test_the_inner_width_may_be_a_ratio():
  config = json.loads((GOLDEN / "llada" / "config.json").read_text())
  config["mlp_hidden_size"] = None
  found = llada.to_llama_config(config, "config.json")
  assert found["intermediate_size"] == 4 * 32


def test_tensors_without_a_name():
  with pytest.raises(UserError, match="q_proj.bias"):
    llada.to_llada_names({"model.layers.0.self_attn.q_proj.bias": None})
