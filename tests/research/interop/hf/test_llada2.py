"""LLaDA's mixtures of experts: sizes, names, and what is refused."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from research.interop import convert, load, sources
from research.interop.diffusion import spec
from research.interop.hf import config as hf_config
from research.interop.hf import llada, llada2
from research.nn import presets
from research.nn.moe import Moe
from research.typing import UserError

GOLDEN = pathlib.Path(__file__).parents[3] / "golden" / "diffusion"

# As published, but for fields that no reader looks at.
LLADA_MOE_7B = dict(
  model_type="llada",
  attention_bias=False,
  clip_qkv=None,
  dense_intermediate_size=8192,
  eos_token_id=156892,
  expert_intermediate_size=1024,
  hidden_act="silu",
  hidden_size=2048,
  max_position_embeddings=8192,
  moe_layer_freq=[1] * 16,
  num_attention_heads=16,
  num_experts=64,
  num_experts_per_tok=8,
  num_hidden_layers=16,
  num_key_value_heads=16,
  partial_rotary_factor=1,
  qk_layernorm=True,
  rms_norm_eps=1e-5,
  rope_theta=50000,
  shared_expert_intermediate_size=None,
  vocab_size=157184,
)
LLADA2_MINI = dict(
  model_type="llada2_moe",
  first_k_dense_replace=1,
  head_dim=128,
  hidden_act="silu",
  hidden_size=2048,
  intermediate_size=5120,
  max_position_embeddings=32768,
  moe_intermediate_size=512,
  n_group=8,
  norm_topk_prob=True,
  num_attention_heads=16,
  num_experts=256,
  num_experts_per_tok=8,
  num_hidden_layers=20,
  num_key_value_heads=4,
  num_shared_experts=1,
  pad_token_id=156892,
  partial_rotary_factor=0.5,
  rms_norm_eps=1e-06,
  rope_theta=600000,
  routed_scaling_factor=2.5,
  score_function="sigmoid",
  tie_word_embeddings=False,
  topk_group=4,
  vocab_size=157184,
)
DIFFUCODER_7B = dict(
  architectures=["DreamModel"],
  model_type="Dream",
  hidden_act="silu",
  hidden_size=3584,
  intermediate_size=18944,
  mask_token_id=151666,
  max_position_embeddings=131072,
  num_attention_heads=28,
  num_hidden_layers=28,
  num_key_value_heads=4,
  pad_token_id=151643,
  eos_token_id=151643,
  rms_norm_eps=1e-06,
  rope_theta=1000000.0,
  tie_word_embeddings=False,
  use_sliding_window=False,
  vocab_size=152064,
)


def model_of(config):
  return presets.transformer(*hf_config.sizes_from_config(config))


def count(model) -> tuple[int, int]:
  """Returns how many parameters there are, and how many a token uses."""
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  )
  every = sum(x.size for x in jax.tree.leaves(shapes))
  idle = 0
  for kind in model.layer_kinds():
    if isinstance(kind.mlp, Moe):
      routing = kind.mlp.routing
      unused = routing.experts - routing.active
      idle += unused * 3 * model.width * kind.mlp.hidden
  return every, every - idle


@pytest.mark.parametrize(
  ("config", "billions", "inner"),
  [(LLADA_MOE_7B, 7.36, 1.076), (LLADA2_MINI, 16.26, 0.789)],
)
def test_published_sizes(config, billions, inner):
  """By hand; LLaDA 2's report has 16B, 789M of them used beside embeddings.

  The first: 16 x (4 x 2,048^2 + 8 x 3 x 2,048 x 1,024 + 64 x 2,048).
  """
  every, used = count(model_of(config))
  outside = 2 * config["vocab_size"] * config["hidden_size"]
  assert abs(every / 1e9 - billions) < 5e-3
  assert abs((used - outside) / 1e9 - inner) < 5e-4


def test_presets_are_the_published_models():
  for name, sizes in (
    ("qwen3_moe", (LLADA_MOE_7B, presets.LLADA_MOE_7B)),
    ("qwen3", (LLADA2_MINI, presets.LLADA2_MINI)),
  ):
    config, preset = sizes
    family = presets.FAMILIES[name]
    assert model_of(config) == presets.transformer(family, preset)


def test_masks_that_config_json_leaves_out():
  found = [spec.from_config(c) for c in (LLADA_MOE_7B, LLADA2_MINI)]
  ends = dict(mask_id=156895, end=(156892,))
  assert found == [spec.Spec(**ends), spec.Spec(**ends, block=32)]
  own = LLADA2_MINI | dict(mask_token_id=9, block_length=16)
  assert spec.from_config(own) == spec.Spec(mask_id=9, block=16, end=(156892,))
  with pytest.raises(UserError, match="mask_token_id is None"):
    spec.from_config(LLADA2_MINI | dict(vocab_size=1000, pad_token_id=1))


def test_diffucoder_is_dream():
  family, sizes = hf_config.sizes_from_config(DIFFUCODER_7B)
  assert family == presets.FAMILIES["qwen2"]
  assert (sizes.width, sizes.depth, sizes.hidden) == (3584, 28, 18944)
  assert spec.from_config(DIFFUCODER_7B) == spec.Spec(
    mask_id=151666, shift=True, end=(151643,)
  )


def test_a_renamed_mixture_is_the_same():
  config = LLADA_MOE_7B | dict(model_type="lladamoe")
  assert model_of(config) == model_of(LLADA_MOE_7B)
  assert spec.from_config(config) == spec.from_config(LLADA_MOE_7B)


def test_a_model_of_ours_is_written_as_llada2():
  """Without its config.json, as after training from scratch."""
  model = model_of(LLADA2_MINI)
  config = hf_config.describe(model)
  assert config["model_type"] == "llada2_moe"
  assert model_of(config) == model
  for name, value in LLADA2_MINI.items():
    if name != "pad_token_id":
      assert config[name] == value, name


def test_dense_models_are_not_written_as_llada2():
  sizes = presets.Sizes(
    vocab=8, width=8, depth=1, heads=1, kv_heads=1, hidden=8, head_dim=8,
    rotated=0.5,
  )  # fmt: skip
  model = presets.transformer(presets.FAMILIES["qwen3"], sizes)
  with pytest.raises(UserError, match="no config.json describes"):
    hf_config.describe(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llada_moe", "llada2"])
@pytest.mark.sample(2)
def test_our_checkpoint_is_written_back_as_the_file(name, tmp_path):
  convert.to_orbax(sources.open_source(GOLDEN / name), tmp_path / "a")
  convert.to_hf(sources.open_source(tmp_path / "a"), tmp_path / "b")
  old, new = (
    safetensors.numpy.load_file(folder / "model.safetensors")
    for folder in (GOLDEN / name, tmp_path / "b")
  )
  assert old.keys() == new.keys()
  for tensor, x in old.items():
    np.testing.assert_array_equal(new[tensor], x)
  assert load.load_model(tmp_path / "b").diffusion is not None


def test_no_quantized_file_of_llada2(tmp_path):
  from research.interop.quantized import checkpoint_formats

  with pytest.raises(UserError, match="quantized files of this family"):
    convert.to_quantized(
      sources.open_source(GOLDEN / "llada2"),
      tmp_path / "a",
      checkpoint_formats.Gptq(8, 4, 1),
      requantize=True,
    )
  assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("llada_moe", {"qk_layernorm": False}, "qk_layernorm is False"),
    ("llada_moe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ("llada_moe", {"moe_layer_freq": [1, 0]}, "3 times 0 or 1"),
    ("llada_moe", {"moe_layer_freq": None}, "3 times 0 or 1"),
    (
      "llada_moe",
      {"moe_router_enable_expert_bias": True},
      "moe_router_enable_expert_bias is True",
    ),
    (
      "llada_moe",
      {"shared_expert_intermediate_size": 12},
      "shared_expert_intermediate_size is 12",
    ),
    ("llada_moe", {"num_attention_heads": 5}, "a divisor of 32"),
    ("llada_moe", {"num_experts": 7}, "6 missing"),
    ("llada_moe", {"mask_token_id": None}, "mask_token_id is None"),
    ("llada2", {"use_qk_norm": False}, "use_qk_norm is False"),
    ("llada2", {"use_sliding_window": True}, "use_sliding_window is True"),
    ("llada2", {"score_function": "softmax"}, "score_function is 'softmax'"),
    ("llada2", {"partial_rotary_factor": 0.2}, "an even part of head_dim"),
    ("llada2", {"partial_rotary_factor": 1.5}, "an even part of head_dim"),
    ("llada2", {"n_group": 5}, "5 groups do not divide 12 experts"),
    ("llada2", {"use_qkv_bias": True}, "9 missing"),
    ("llada2", {"num_key_value_heads": 4}, "3 superfluous"),
    ("llada2", {"first_k_dense_replace": 4}, "at most 3"),
    ("llada2", {"block_length": 0}, "block_length is 0"),
  ],
)
def test_what_is_not_supported_is_named(name, change, message, tmp_path):
  shutil.copytree(GOLDEN / name, tmp_path / "a")
  file = tmp_path / "a" / "config.json"
  config = json.loads(file.read_text()) | change
  file.write_text(
    json.dumps({k: v for k, v in config.items() if v is not None})
  )
  with pytest.raises(UserError, match=message):
    load.load_model(tmp_path / "a")


def test_a_fused_matrix_that_does_not_divide_is_superfluous(tmp_path):
  shutil.copytree(GOLDEN / "llada2", tmp_path / "a")
  file = tmp_path / "a" / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  name = "model.layers.1.attention.query_key_value.weight"
  tensors[name] = tensors[name][:-1]
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(UserError, match=f"1 superfluous: {name}"):
    load.load_model(tmp_path / "a")


def test_names_have_one_meaning():
  """Every usual name of ours has one of theirs, and back."""
  names = safetensors.numpy.load_file(GOLDEN / "llada2" / "model.safetensors")
  assert not any(".self_attn." in name for name in names)
  assert llada.is_mixture(LLADA_MOE_7B)
  assert not llada.is_mixture(LLADA_MOE_7B | dict(d_model=4))
  assert llada2.to_qwen3_moe_names(
    {"model.layers.0.other.weight": 1}, 4, 2
  ) == {"model.layers.0.other.weight": 1}
