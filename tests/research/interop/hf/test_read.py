"""Directories are read strictly: every difference is an error that says so."""

import dataclasses
import json
import pathlib
import shutil

import chex
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from research import tree
from research.interop import hf
from research.interop.hf import config as hf_config
from research.interop.hf import write as hf_write
from research.io import safetensors
from research.nn import presets, rope, time_embedding
from research.typing import UserError

MODELS = pathlib.Path(__file__).parents[3] / "golden" / "models"
CONFIGS = {
  p.parent.name: json.loads(p.read_text())
  for p in sorted(MODELS.glob("*/config.json"))
}


def model_of(config):
  return presets.transformer(*hf_config.sizes_from_config(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_written_and_read_again(name):
  model = model_of(CONFIGS[name])
  config = hf_config.config_from_model(model, CONFIGS[name]["model_type"])
  assert model_of(json.loads(json.dumps(config))) == model


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_both_spellings_of_transformers_mean_the_same(name):
  assert model_of(CONFIGS[name]) == model_of(CONFIGS[f"{name}_saved"])


def test_a_model_that_the_family_cannot_describe():
  model = model_of(CONFIGS["gemma2"])
  with pytest.raises(UserError, match="cannot describe"):
    hf_config.config_from_model(model, "llama")


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(model_type="mamba"), "model_type is 'mamba'.*\nSupported: llama"),
    (dict(model_type=None), "model_type is None"),
    (dict(hidden_act="mish"), "hidden_act is 'mish', expected one of silu"),
    (dict(num_local_experts=8), "num_local_experts is 8"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    (dict(hidden_size=40.0), "hidden_size is 40.0, expected a whole number"),
    (dict(hidden_size=None), "hidden_size is None"),
    (dict(num_hidden_layers=-1), "num_hidden_layers is -1"),
    (dict(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, exp"),
    (dict(vocab_size=2**31), "vocab_size is 2147483648, expected at most"),
    (dict(num_key_value_heads=3), "num_key_value_heads is 3, expected a div"),
    (dict(head_dim=5), "head_dim is 5, expected an even number"),
    (dict(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5', expected a number"),
    (dict(tie_word_embeddings=1), "tie_word_embeddings is 1, expected true"),
    (dict(rope_scaling=dict(type="longrope")), "type is 'longrope'"),
    (dict(rope_scaling=dict(type="linear")), "factor is None"),
    (dict(rope_scaling=[1]), r"rope_scaling is \[1\], expected an object"),
    (
      dict(rope_scaling=dict(type="linear", factor=2, long_factor=[1])),
      "long_factor",
    ),
    (dict(layer_types=["full_attention"]), "layer_types"),
    (dict(layer_types=["chunked"] * 3), "layer_types"),
  ],
)
def test_what_is_not_understood_is_named(change, message):
  with pytest.raises(UserError, match=message) as e:
    model_of(CONFIGS["llama"] | change)
  assert str(e.value).startswith("config.json")
  assert len(str(e.value).split("\n")) <= 3


@pytest.mark.parametrize(
  "fields, want",
  [
    (dict(rope_theta=5), rope.Rope(theta=5.0)),
    (dict(rope_parameters=dict(rope_theta=7)), rope.Rope(theta=7.0)),
    (
      dict(rope_scaling=dict(type="yarn", factor=4.0)),
      rope.Rope(scaling=rope.Yarn(factor=4.0, original=128)),
    ),
    (
      # The factor of DeepSeek's files: what the lengths say.
      dict(
        rope_scaling=dict(
          rope_type="yarn", factor=None, original_max_position_embeddings=16
        )
      ),
      rope.Rope(scaling=rope.Yarn(factor=8.0, original=16)),
    ),
    (
      dict(
        rope_parameters=dict(
          full_attention=dict(rope_type="linear", factor=3, rope_theta=9),
          sliding_attention=dict(rope_type="linear", factor=3, rope_theta=9),
        )
      ),
      rope.Rope(theta=9.0, scaling=rope.Linear(factor=3.0)),
    ),
  ],
)
def test_rotations(fields, want):
  config = {k: v for k, v in CONFIGS["llama"].items() if k != "rope_theta"}
  model = model_of(config | fields)
  assert model.layer_kinds()[0].attention.rope == want


def test_sizes_that_a_llama_leaves_out():
  """`text_config` of llava-hf/llava-1.5-7b-hf; `LlamaConfig` has the rest."""
  given = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    max_position_embeddings=4_096,
    rms_norm_eps=1e-05,
    torch_dtype="float16",
    vocab_size=32_064,
  )
  sizes = hf_config.sizes_from_config(given)[1]
  assert sizes == dataclasses.replace(
    presets.LLAMA2_7B, vocab=32_064, pattern=("global",)
  )


@pytest.mark.parametrize(
  ("fields", "want"),
  [
    (dict(hidden_act="gelu"), "gelu_tanh"),  # google/gemma-2b
    (dict(hidden_act="silu"), "silu"),
    (dict(), "gelu_tanh"),
  ],
)
def test_the_activation_of_gemma(fields, want):
  """As `GemmaConfig` reads what files say of it."""
  names = ("hidden_act", "hidden_activation")
  config = {k: v for k, v in CONFIGS["gemma"].items() if k not in names}
  assert model_of(config | fields).layer_kinds()[0].mlp.activation == want


def test_window_only_where_the_file_says():
  def windows(config):
    return [k.attention.window for k in model_of(config).layer_kinds()]

  assert windows(CONFIGS["mistral"]) == [7] * 3
  assert windows(CONFIGS["mistral"] | dict(sliding_window=None)) == [None] * 3
  assert windows(CONFIGS["qwen2"]) == [None] * 3
  assert windows(CONFIGS["qwen2_window"]) == [None, 7, 7]
  assert windows(CONFIGS["gemma2"]) == [7, None, 7]
  # A size that is used and not given is that of transformers' class.
  for name in ("qwen2_window", "qwen3"):
    config = CONFIGS[name] | dict(use_sliding_window=True, max_window_layers=1)
    del config["sliding_window"]
    assert windows(config) == [None, 4_096, 4_096]
  types = ["full_attention", "sliding_attention", "full_attention"]
  explicit = CONFIGS["gemma2"] | dict(layer_types=types)
  assert windows(explicit) == [None, 7, None]


def test_a_claim_of_enormous_sizes_costs_nothing(tmp_path):
  sizes = dict.fromkeys(
    ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
    2**24,
  )
  config = CONFIGS["llama"] | sizes | dict(num_hidden_layers=4096, head_dim=256)
  shutil.copytree(MODELS / "llama", tmp_path, dirs_exist_ok=True)
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match="36837 missing"):
    hf.model_from_directory(tmp_path)


@pytest.fixture(scope="module")
def base():
  model = model_of(CONFIGS["smollm2"])
  tensors = safetensors.open_directory(MODELS / "smollm2")
  return model, {k: v.read() for k, v in tensors.items()}


def read(tmp_path, model, tensors, dtype="float32"):
  safetensors.write_file(tmp_path / "model.safetensors", tensors)
  opened = safetensors.open_directory(tmp_path)
  return hf.read_params(model, opened, dtype, tmp_path)


Q = "model.layers.1.self_attn.q_proj.weight"
EMBED = "model.embed_tokens.weight"


def test_missing_and_superfluous_tensors_are_listed(tmp_path, base):
  model, tensors = base
  changed = {k: v for k, v in tensors.items() if k != Q}
  changed |= {f"model.layers.0.experts.{i}": np.zeros(1) for i in range(12)}
  with pytest.raises(UserError) as e:
    read(tmp_path, model, changed)
  _, missing, extra = str(e.value).split("\n")
  assert missing == f"1 missing: {Q}"
  assert extra.startswith("12 superfluous: model.layers.0.experts.0, ")
  assert extra.endswith(" and 2 more")


def test_a_layer_too_many_is_superfluous(tmp_path, base):
  model, tensors = base
  more = {
    k.replace("layers.2", "layers.3"): v
    for k, v in tensors.items()
    if "layers.2" in k
  }
  with pytest.raises(UserError, match="9 superfluous"):
    read(tmp_path, model, tensors | more)


def test_wrong_shape_and_dtype(tmp_path, base):
  model, tensors = base
  with pytest.raises(UserError) as e:
    read(tmp_path, model, tensors | {Q: tensors[Q][:-1]})
  assert f"{Q} has shape [35, 36], expected [36, 36]" in str(e.value)
  with pytest.raises(UserError, match="stored as int8"):
    read(tmp_path, model, tensors | {Q: tensors[Q].astype(np.int8)})


def test_a_copied_head_must_equal_the_tied_embedding(tmp_path, base):
  model, tensors = base
  same = tensors | {"lm_head.weight": tensors[EMBED]}
  read(tmp_path, model, same)
  with pytest.raises(UserError, match="tie_word_embeddings"):
    read(tmp_path, model, same | {"lm_head.weight": tensors[EMBED] + 1})


def test_rotary_tables_of_old_files_are_left_out(tmp_path, base):
  model, tensors = base
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  read(tmp_path, model, tensors | {name: np.ones(3, np.float32)})


def test_matrices_are_transposed_into_their_layer(tmp_path, base):
  model, tensors = base
  params = read(tmp_path, model, tensors)
  got = list(tree.layers(params))[1]["attention"]["q"]
  np.testing.assert_array_equal(got, tensors[Q].T)
  chex.assert_tree_all_finite(params)
  assert tree.count(params) == sum(v.size for v in tensors.values())


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_dtypes_round_to_nearest_even(tmp_path, base, stored):
  model, tensors = base
  kind = np.dtype(getattr(ml_dtypes, stored, stored))
  narrow = {k: v.astype(kind) for k, v in tensors.items()}
  params = read(tmp_path, model, narrow, "bfloat16")
  assert {x.dtype for _, x in tree.flatten_paths(params)} == {
    jnp.dtype("bfloat16")
  }
  want = jnp.asarray(narrow[EMBED]).astype(jnp.bfloat16)
  chex.assert_trees_all_equal(params["embed"], want)


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.sample(2)
def test_the_text_part_of_a_multimodal_gemma(tmp_path, spelling):
  folder = tmp_path / "gemma3"
  shutil.copytree(MODELS / "gemma3", folder)
  config = dict(model_type="gemma3", text_config=CONFIGS["gemma3"])
  (folder / "config.json").write_text(json.dumps(config))
  tensors = {k: v.read() for k, v in safetensors.open_directory(folder).items()}
  if spelling == "old":
    named = {f"language_model.{k}": v for k, v in tensors.items()}
    named["vision_tower.x"] = np.zeros(1)
  else:
    named = {
      k.replace("model.", "model.language_model.", 1): v
      for k, v in tensors.items()
    }
    named["model.multi_modal_projector.x"] = np.zeros(1)
  safetensors.write_file(folder / "model.safetensors", named)
  model, params, _ = hf.model_from_directory(folder)
  plain, want, _ = hf.model_from_directory(MODELS / "gemma3")
  assert model == plain
  chex.assert_trees_all_equal(params, want)


def test_the_text_part_keeps_what_ends_its_turns():
  """google/gemma-3-4b-it has `eos_token_id` beside `text_config`."""
  given = dict(
    model_type="gemma3",
    text_config=CONFIGS["gemma3"] | dict(bos_token_id=5),
    eos_token_id=[1, 106],
    bos_token_id=6,
  )
  del given["text_config"]["eos_token_id"]
  model = presets.transformer(*hf_config.sizes_from_config(given))
  got = hf_write.config_json(model, given, None)
  assert got["model_type"] == "gemma3_text"
  assert got["eos_token_id"] == [1, 106] and got["bos_token_id"] == 5


@pytest.mark.parametrize(
  ("name", "changes"),
  [
    ("gemma3", dict(attn_logit_softcapping=50.0)),
    ("llama", dict(final_logit_softcapping=30.0)),
    ("mistral", dict(layer_types=["full_attention", "sliding_attention"])),
    ("gemma", dict(hidden_activation="relu")),
    ("llama", dict(model_type=[1, 2])),
  ],
)
def test_what_transformers_ignores_is_not_applied(name, changes):
  """It was, without a word; tests/peers goes through every field."""
  config = CONFIGS[name]
  if "layer_types" in changes:
    config = config | dict(num_hidden_layers=2, sliding_window=4)
  model_of(config)
  with pytest.raises(UserError, match=f"{[*changes][0]} is "):
    model_of(config | changes)


def test_a_time_conditioned_model_round_trips():
  embedding = time_embedding.TimeEmbedding(
    input="time", scale=1000.0, features=8, zero_gate=True
  )
  family, sizes = hf_config.sizes_from_config(CONFIGS["llama"])
  model = presets.transformer(
    family, dataclasses.replace(sizes, time_embedding=embedding)
  )
  config = hf_config.config_from_model(model, "llama")
  assert model_of(json.loads(json.dumps(config))) == model
  name = hf_config.TIME_CONDITIONING
  wrong = config | {name: config[name] | {"input": "t"}}
  with pytest.raises(UserError, match=f"{name}: TimeEmbedding.input: found"):
    model_of(wrong)
