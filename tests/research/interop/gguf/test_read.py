"""GGUF files as models, against transformers' logits of the same weights."""

import functools
import json
import math
import pathlib

import chex
import jax
import numpy as np
import pytest

from research import tree, weights
from research.interop import packages
from research.interop.gguf import Tensor, open_gguf, write_gguf
from research.interop.gguf.read import (
  half_split,
  interleaved,
  load_gguf,
)
from research.interop.gguf.tensor_types import TYPES
from research.io import safetensors
from research.nn import rope
from research.quant.formats import ggml
from research.typing import UserError
from tests.support_gguf import permute_rows

GOLDEN = pathlib.Path(__file__).parents[3] / "golden"
MODELS = GOLDEN / "models"
FILES = sorted(p.parent.name for p in MODELS.glob("gguf_*/model.gguf"))
TABLE = json.loads((GOLDEN / "gguf_names.json").read_text())
FAMILIES = {
  "llama": "llama",
  "llama3": "llama",
  "llama_biases": "llama",
  "llama_linear": "llama",
  "llama_yarn": "llama",
  "mistral": "llama",
  "smollm2": "llama",
  "qwen2": "qwen2",
  "qwen3": "qwen3",
  "gemma": "gemma",
  "gemma2": "gemma2",
  "gemma3": "gemma3",
}


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, tokens, positions=None):
  variables = {"params": params}
  hidden, _ = model.apply(variables, tokens, positions)
  return model.apply(variables, hidden, method="logits")


def close(got, want, tolerance=1e-5):
  error = np.abs(np.asarray(got) - want).max() / np.ptp(want)
  assert error < tolerance, f"error {error:.1e} of the logits' range"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.cover(1)
def test_logits_are_transformers(name, packed):
  it = load_gguf(MODELS / name / "model.gguf", packed=packed)
  with np.load(MODELS / name / "golden.npz") as golden:
    close(logits(it.model, it.params, golden["tokens"]), golden["logits"])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.sample(4)
def test_packed_weights_are_the_decoded_ones_bit_for_bit(name):
  path = MODELS / name / "model.gguf"
  dense, packed = (load_gguf(path, packed=p).params for p in (False, True))
  got = jax.tree.map(weights.dense, packed, is_leaf=weights.is_weight)
  chex.assert_trees_all_equal(
    jax.tree.leaves(tree.unroll(got)), jax.tree.leaves(tree.unroll(dense))
  )


def converted(family: str) -> tuple[dict, dict[str, Tensor]]:
  """Returns metadata and tensors as llama.cpp's converter makes them."""
  folder, name = MODELS / family, FAMILIES[family]
  config = json.loads((folder / "config.json").read_text())
  heads, depth = config["num_attention_heads"], config["num_hidden_layers"]
  head_dim = config.get("head_dim") or config["hidden_size"] // heads
  values = dict(
    VOCAB_SIZE=config["vocab_size"],
    CONTEXT_LENGTH=config["max_position_embeddings"],
    EMBEDDING_LENGTH=config["hidden_size"],
    BLOCK_COUNT=depth,
    FEED_FORWARD_LENGTH=config["intermediate_size"],
    HEAD_COUNT=heads,
    HEAD_COUNT_KV=config["num_key_value_heads"],
    KEY_LENGTH=head_dim,
    VALUE_LENGTH=head_dim,
    LAYERNORM_RMS_EPS=config["rms_norm_eps"],
    FREQ_BASE=float(config["rope_theta"]),
    DIMENSION_COUNT=head_dim,
  )
  if config["model_type"] in ("mistral", "gemma2", "gemma3_text"):
    values["SLIDING_WINDOW"] = config["sliding_window"]
  for key in ("attn_logit_softcapping", "final_logit_softcapping"):
    if config.get(key):
      values[key.upper()] = config[key]
  scaling = config.get("rope_scaling") or {}
  kind = scaling.get("rope_type", scaling.get("type"))
  if kind in ("linear", "yarn"):
    values |= dict(SCALING_TYPE=kind, SCALING_FACTOR=scaling["factor"])
  if kind == "yarn":
    values |= dict(
      SCALING_ORIG_CTX_LEN=scaling["original_max_position_embeddings"],
      SCALING_YARN_BETA_FAST=scaling["beta_fast"],
      SCALING_YARN_BETA_SLOW=scaling["beta_slow"],
    )
  metadata = {"general.architecture": name} | {
    TABLE["keys"][k].format(arch=name): v for k, v in values.items()
  }
  tensors = {}
  if kind == "llama3":
    tensors["rope_freqs.weight"] = plain(llama3_factors(config, head_dim))
  stored = safetensors.open_directory(folder)
  for hf, gguf_name, x in renamed(stored, TABLE["names"][name], depth):
    if name.startswith("gemma") and hf.endswith("norm.weight"):
      x = x + 1
    # GGUF says nothing of a scale of the logits besides H^-0.5: fold it.
    if "query_pre_attn_scalar" in config and name in ("gemma2", "gemma3"):
      where = "q_proj.weight" if name == "gemma2" else "q_norm.weight"
      if hf.endswith(where):
        x = x * math.sqrt(head_dim / config["query_pre_attn_scalar"])
    tensor = plain(x)
    if name == "llama" and ".q_proj." in hf:
      tensor = permute_rows(tensor, interleaved(x.shape[0], heads))
    if name == "llama" and ".k_proj." in hf:
      kv_heads = config["num_key_value_heads"]
      tensor = permute_rows(tensor, interleaved(x.shape[0], kv_heads))
    tensors[gguf_name] = tensor
  return metadata, tensors


def renamed(stored, names, depth):
  """Yields HF name, GGUF name and array, by the gguf package's table."""
  for hf, lazy in stored.items():
    parts = hf.split(".")
    layer = parts[2] if parts[1] == "layers" else "0"
    assert int(layer) < depth
    first = names[hf.replace(f".layers.{layer}.", ".layers.0.")]
    yield hf, first.replace("blk.0.", f"blk.{layer}."), lazy.read()


def plain(x: np.ndarray) -> Tensor:
  x = np.ascontiguousarray(x, np.float32)
  return Tensor("F32", x.shape, x.reshape(-1).view(np.uint8))


def llama3_factors(config: dict, dim: int) -> np.ndarray:
  """Returns the divisors of each frequency, as the converter computes them."""
  scaling, base = config["rope_scaling"], config["rope_theta"]
  original = scaling["original_max_position_embeddings"]
  low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
  out = []
  for i in range(0, dim, 2):
    wavelength = 2 * math.pi * base ** (i / dim)
    if wavelength < original / high:
      out.append(1.0)
    elif wavelength > original / low:
      out.append(scaling["factor"])
    else:
      smooth = (original / wavelength - low) / (high - low)
      out.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
  return np.asarray(out)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.sample(3)
def test_every_family_has_transformers_logits(family, tmp_path):
  path = tmp_path / "model.gguf"
  write_gguf(path, *converted(family))
  it = load_gguf(path)
  with np.load(MODELS / family / "golden.npz") as golden:
    real = golden["attention_mask"].astype(bool)
    got = logits(it.model, it.params, golden["tokens"], golden["positions"])
    close(np.asarray(got)[real], golden["logits"][real])
  if family == "llama3":
    scaling = it.model.stack.blocks[0].attention.rope.scaling
    assert scaling == rope.Llama3(factor=8.0, low=1.0, high=4.0, original=32)


def test_a_factor_without_a_type_scales_linearly(tmp_path):
  """As llama.cpp reads it: `std::string rope_scaling("linear")`."""
  metadata, tensors = converted("llama_linear")
  del metadata["llama.rope.scaling.type"]
  write_gguf(tmp_path / "x.gguf", metadata, tensors)
  it = load_gguf(tmp_path / "x.gguf")
  with np.load(MODELS / "llama_linear" / "golden.npz") as golden:
    real = golden["attention_mask"].astype(bool)
    got = logits(it.model, it.params, golden["tokens"], golden["positions"])
    close(np.asarray(got)[real], golden["logits"][real])


def test_early_files_of_gemma2_leave_out_window_and_caps(tmp_path):
  """The defaults are llama.cpp's (`LLM_ARCH_GEMMA2`, `llama_hparams`)."""
  metadata, tensors = converted("gemma2")
  left_out = ("sliding_window", "attn_logit_softcapping", "final_logit_softcap")
  given = {
    k: v for k, v in metadata.items() if not any(x in k for x in left_out)
  }
  assert len(given) == len(metadata) - 3
  write_gguf(tmp_path / "x.gguf", given, tensors)
  model = load_gguf(tmp_path / "x.gguf").model
  attentions = [kind.attention for kind in model.layer_kinds()]
  assert [a.window for a in attentions] == [4_096, None, 4_096]
  assert {a.softcap for a in attentions} == {50.0}
  assert model.softcap == 30.0


def test_a_file_says_which_layers_are_global(tmp_path):
  metadata, tensors = converted("gemma3")
  key = "gemma3.attention.sliding_window_pattern"
  for every, want in ((2, [7, None]), (1 << 31, [7])):
    write_gguf(tmp_path / "x.gguf", metadata | {key: every}, tensors)
    blocks_ = load_gguf(tmp_path / "x.gguf").model.stack.blocks
    assert [b.attention.window for b in blocks_] == want


def test_rows_of_any_type_move_whole():
  order = half_split(24, 3)
  assert order[:8].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
  x = np.random.default_rng(0).integers(0, 256, (24, 20), np.uint8)
  tensor = Tensor("Q4_1", (24, 32), x.reshape(-1))
  moved = permute_rows(tensor, order)
  np.testing.assert_array_equal(moved.decode(), tensor.decode()[order])
  back = permute_rows(moved, interleaved(24, 3))
  np.testing.assert_array_equal(back.data, tensor.data)


# Bad models ------------------------------------------------------------------


def drop(name):
  def change(metadata, tensors):
    del tensors[name]

  return change


def put(key, value):
  def change(metadata, tensors):
    metadata[key] = value

  return change


def add(name, tensor):
  def change(metadata, tensors):
    tensors[name] = tensor

  return change


def zeros(kind, *shape):
  size = math.prod(shape) // TYPES[kind].block * TYPES[kind].nbytes
  return Tensor(kind, shape, np.zeros(size, np.uint8))


BAD = {
  "architecture": (
    put("general.architecture", "mamba"),
    "found 'mamba', supported: llama, qwen2, .*gemma3",
  ),
  "towers": (
    put("general.architecture", "clip"),
    "found 'clip', an image encoder alone .*mmproj.*expected a language model",
  ),
  "no layers": (
    put("llama.block_count", 0),
    "block_count: found 0, expected one positive integer",
  ),
  "absurdly many layers": (
    put("llama.block_count", 1 << 31),
    "found 2147483648, expected at most the 21 tensors",
  ),
  "an array": (
    put("llama.attention.head_count", np.arange(1, 3)),
    "head_count: found array.*expected one positive integer",
  ),
  "an unknown array": (
    put("llama.something", np.arange(1, 3)),
    "llama.something: found array.*not supported",
  ),
  "too many tokens": (
    lambda metadata, tensors: metadata.update(
      {
        "tokenizer.ggml.tokens": [*metadata["tokenizer.ggml.tokens"], "zz"],
        "tokenizer.ggml.token_type": np.ones(271, np.int32),
      }
    ),
    "tokenizer has 271 tokens, the embedding 270 rows",
  ),
  "tokenizer": (
    put("tokenizer.ggml.pre", "viking"),
    "tokenizer.ggml.pre: found 'viking', expected one of",
  ),
  "too many layers": (
    put("llama.block_count", 3),
    r"missing: blk.2.attn_k.weight.*\nsuperfluous: none",
  ),
  "a float": (put("llama.block_count", 2.0), "found 2.0, expected"),
  "missing": (drop("blk.1.ffn_up.weight"), "missing: blk.1.ffn_up.weight"),
  "no embedding": (drop("token_embd.weight"), "no matrix 'token_embd"),
  "superfluous": (
    add("blk.0.extra.weight", zeros("F32", 4)),
    "no place for: blk.0.extra.weight",
  ),
  "shape": (
    add("blk.0.ffn_up.weight", zeros("F32", 32, 32)),
    r"found shape \(32, 32\), expected \(64, 32\)",
  ),
  "heads": (
    put("llama.attention.head_count_kv", 3),
    "head_count_kv: found 3, expected to divide 2",
  ),
  "experts": (
    put("llama.expert_count", 8),
    "expert_used_count: found 'nothing', expected a pos",
  ),
  "rope type": (
    lambda metadata, tensors: metadata.update(
      {
        "llama.rope.scaling.type": "longrope",
        "llama.rope.scaling.factor": 2.0,
      }
    ),
    "found 'longrope', expected none, linear or yarn",
  ),
  "rope factors": (
    add("rope_freqs.weight", plain(np.linspace(1, 8, 8))),
    "not Llama 3's scaling",
  ),
  "partial rotation": (
    put("llama.rope.dimension_count", 8),
    "dimension_count: found 8, expected the head's 16",
  ),
  "type": (
    add("output_norm.weight", zeros("F64", 32)),
    "'output_norm.weight' has type F64; supported",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_model_is_one_clear_error(name, tmp_path):
  file = open_gguf(MODELS / "gguf_f32" / "model.gguf")
  metadata, tensors = dict(file.metadata), dict(file.tensors)
  change, message = BAD[name]
  change(metadata, tensors)
  path = tmp_path / "bad.gguf"
  write_gguf(path, metadata, tensors)
  with pytest.raises(UserError, match=message) as error:
    load_gguf(path)
  assert str(path) in str(error.value)
  assert str(error.value).count("\n") <= 2


# The real model --------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
  return load_gguf(packages.packaged("smollm2-135m"), packed=True)


@pytest.mark.slow
def test_the_real_model_packed_is_transformers(real):
  with np.load(MODELS / "smollm2-135m.npz") as golden:
    ids, top = golden["ids"][:1, :64], golden["top_ids"][:1, :64]
    got = np.asarray(logits(real.model, real.params, ids.astype(np.int32)))
    want, span = golden["top_logits"][:1, :64], golden["span"]
  error = np.abs(np.take_along_axis(got, top.astype(int), -1) - want).max()
  assert error < 2e-4 * span
  np.testing.assert_array_equal(got.argmax(-1), top[..., 0])


def test_the_real_model_occupies_five_bits_a_weight(real):
  layers = real.params["run0"]["layer0"]
  linears = [layers["attention"], layers["mlp"]]
  sizes = [
    math.prod(w.shape)
    for w in jax.tree.leaves(linears, is_leaf=weights.is_weight)
  ]
  assert sum(sizes) == 106_168_320
  assert tree.nbytes(linears) * 8 == 5 * sum(sizes)
  assert tree.nbytes(real.params) * 8 < 6 * 134_515_008


@pytest.mark.slow
def test_the_real_file_comes_back_byte_for_byte(real):
  file = open_gguf(real.source["path"])
  heads = {"q": 9, "k": 3}
  names = dict(q="attn_q", k="attn_k", v="attn_v", o="attn_output")
  names |= dict(gate="ffn_gate", up="ffn_up", down="ffn_down")
  embed = ggml.to_ggml(real.params["embed"])
  np.testing.assert_array_equal(
    embed.reshape(-1), file.tensors["token_embd.weight"].data
  )
  checked = 1
  for part in ("attention", "mlp"):
    for key, leaf in real.params["run0"]["layer0"][part].items():
      for i, raw in enumerate(ggml.to_ggml(leaf)):
        stored = file.tensors[f"blk.{i}.{names[key]}.weight"]
        if key in heads:
          raw = raw[interleaved(raw.shape[0], heads[key])]
        np.testing.assert_array_equal(raw.reshape(-1), stored.data)
        checked += 1
  assert checked == 211
