"""GGUF files with experts: read, written, packed, refused."""

import functools
import json

import chex
import jax
import numpy as np
import pytest

from research import tree, weights
from research.interop import convert, load, parts, sources
from research.interop.gguf import Tensor, open_gguf, write_gguf
from research.interop.gguf import recipe as gguf_recipe
from research.interop.gguf import write as gguf_write
from research.interop.gguf.read import interleaved, load_gguf
from research.io import safetensors
from research.lora.merge import changes
from research.nn.moe.routing import Routing
from research.nn.presets import Sparse
from research.quant.qtensor import QTensor
from research.typing import UserError
from tests import support
from tests.research.interop.gguf.test_read import (
  MODELS,
  TABLE,
  close,
  logits,
  plain,
)
from tests.support_gguf import permute_rows

EXPERTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}


@functools.cache
def mixtral() -> tuple[dict, dict[str, Tensor]]:
  """Returns metadata and tensors as llama.cpp's converter makes them.

  Its `LlamaModel` collects each expert's `w1`, `w2`, `w3` and stacks them; the
  router is `block_sparse_moe.gate`.
  """
  folder = MODELS / "mixtral"
  config = json.loads((folder / "config.json").read_text())
  heads, depth = config["num_attention_heads"], config["num_hidden_layers"]
  kv_heads, width = config["num_key_value_heads"], config["hidden_size"]
  dim = config.get("head_dim") or width // heads
  metadata = {
    "general.architecture": "llama",
    "llama.vocab_size": config["vocab_size"],
    "llama.context_length": config["max_position_embeddings"],
    "llama.embedding_length": width,
    "llama.block_count": depth,
    "llama.feed_forward_length": config["intermediate_size"],
    "llama.attention.head_count": heads,
    "llama.attention.head_count_kv": kv_heads,
    "llama.attention.key_length": dim,
    "llama.attention.value_length": dim,
    "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    "llama.rope.freq_base": float(config["rope_theta"]),
    "llama.rope.dimension_count": dim,
    "llama.expert_count": config["num_local_experts"],
    "llama.expert_used_count": config["num_experts_per_tok"],
  }
  if config.get("sliding_window"):
    metadata["llama.attention.sliding_window"] = config["sliding_window"]
  stored = safetensors.open_directory(folder)
  tensors, names = {}, TABLE["names"]["llama"]
  for name, lazy in stored.items():
    if ".block_sparse_moe." in name:
      continue
    bits = name.split(".")
    layer = bits[2] if bits[1] == "layers" else "0"
    first = names[name.replace(f".layers.{layer}.", ".layers.0.")]
    tensor = plain(lazy.read())
    for key, n in (("q_proj", heads), ("k_proj", kv_heads)):
      if key in name:
        tensor = permute_rows(tensor, interleaved(tensor.shape[0], n))
    tensors[first.replace("blk.0.", f"blk.{layer}.")] = tensor
  for i in range(depth):
    moe = f"model.layers.{i}.block_sparse_moe"
    router = stored[f"{moe}.gate.weight"].read()
    tensors[f"blk.{i}.ffn_gate_inp.weight"] = plain(router)
    for theirs, name in EXPERTS.items():
      stack = [
        stored[f"{moe}.experts.{e}.{theirs}.weight"].read()
        for e in range(config["num_local_experts"])
      ]
      tensors[f"blk.{i}.{name}.weight"] = plain(np.stack(stack))
  return metadata, tensors


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  path = tmp_path_factory.mktemp("experts") / "mixtral.gguf"
  write_gguf(path, *mixtral())
  return path


def test_mixtral_has_transformers_logits(file):
  it = load_gguf(file)
  with np.load(MODELS / "mixtral" / "golden.npz") as golden:
    real = golden["attention_mask"].astype(bool)
    got = logits(it.model, it.params, golden["tokens"], golden["positions"])
    close(np.asarray(got)[real], golden["logits"][real])


def test_written_as_the_converter_does_and_back(file, tmp_path):
  convert.to_gguf(
    sources.open_source(MODELS / "mixtral"),
    tmp_path / "again.gguf",
    gguf_recipe.Recipe("F32"),
  )
  metadata, tensors = mixtral()
  got = open_gguf(tmp_path / "again.gguf")
  assert got.tensors.keys() == tensors.keys()
  for name, want in tensors.items():
    assert got.tensors[name].shape == want.shape, name
    np.testing.assert_array_equal(got.tensors[name].data, want.data, name)
  for key, value in metadata.items():
    assert got.metadata[key] == pytest.approx(value), key
  convert.to_hf(sources.open_source(file), tmp_path / "hf")
  want = safetensors.open_directory(MODELS / "mixtral")
  back = safetensors.open_directory(tmp_path / "hf")
  assert back.keys() == want.keys()
  for name in want:
    np.testing.assert_array_equal(back[name].read(), want[name].read(), name)


@functools.cache
def qwen():
  """Returns a model whose experts have whole blocks, and its parameters."""
  sparse = Sparse(routing=Routing(experts=3, active=2), hidden=32)
  sizes = dict(width=64, hidden=64, head_dim=16, depth=2, window=None)
  model = support.model("qwen3_moe", sparse=sparse, **sizes)
  return model, support.params(model)


def written(path, kind, of=None):
  model, params = of or qwen()
  return gguf_write.write_model(
    path,
    model,
    parts.from_params(params),
    gguf_recipe.Recipe(kind),
    changes.Log(),
  )


@pytest.mark.slow
def test_qwens_experts_stay_packed(tmp_path):
  written(tmp_path / "a.gguf", "Q8_0")
  opened = open_gguf(tmp_path / "a.gguf")
  assert opened.metadata["general.architecture"] == "qwen3moe"
  assert opened.metadata["qwen3moe.expert_feed_forward_length"] == 32
  assert opened.tensors["blk.1.ffn_down_exps.weight"].shape == (3, 64, 32)
  assert opened.tensors["blk.1.ffn_down_exps.weight"].type == "Q8_0"
  assert opened.tensors["blk.1.ffn_gate_inp.weight"].type == "F32"
  packed, wide = (
    load_gguf(tmp_path / "a.gguf", packed=p).params for p in (True, False)
  )
  moe = packed["run0"]["layer0"]["mlp"]
  assert isinstance(moe["experts"]["up"], QTensor)
  assert moe["experts"]["up"].shape == (2, 3, 64, 32)
  assert not isinstance(moe["router"], QTensor)
  dense = jax.tree.map(weights.dense, packed, is_leaf=weights.is_weight)
  chex.assert_trees_all_equal(dense, wide)
  model, params = qwen()
  # Half a step of 127, and a scale rounded to float16.
  for path, w in tree.flatten_paths(params):
    got = dict(tree.flatten_paths(wide))[path]
    assert np.abs(got - w).max() <= np.abs(w).max() * (1 / 254 + 2**-11), path
  tokens = support.tokens()
  close(
    logits(load_gguf(tmp_path / "a.gguf").model, packed, tokens),
    np.asarray(logits(model, wide, tokens)),
  )
  # Blocks go out as they came in.
  before = sources.open_source(tmp_path / "a.gguf")
  log, *_ = convert.to_gguf(before, tmp_path / "b.gguf", gguf_recipe.Recipe())
  assert log.summary()["changed"] == 0
  for name, tensor in opened.tensors.items():
    again = open_gguf(tmp_path / "b.gguf").tensors[name]
    np.testing.assert_array_equal(again.data, tensor.data, name)


def test_what_has_no_name_there_is_refused(tmp_path):
  # Its first layer has a single feed-forward.
  it = load.load_model(MODELS / "qwen3_moe")
  with pytest.raises(
    UserError, match="layer 0 has no experts, and others have"
  ):
    written(tmp_path / "x.gguf", "F32", (it.model, it.params))
  model, params = qwen()
  sparse = Sparse(
    routing=Routing(experts=3, active=2, normalised=False), hidden=32
  )
  sizes = dict(width=64, hidden=64, head_dim=16, depth=2, window=None)
  other = support.model("qwen3_moe", sparse=sparse, **sizes)
  with pytest.raises(UserError, match="cannot describe this model"):
    written(tmp_path / "x.gguf", "F32", (other, params))


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"llama.expert_used_count": 99}, "expert_used_count: found 99"),
    ({"llama.expert_used_count": None}, "expert_used_count: found 'nothing'"),
    ({"llama.expert_count": 2}, r"ffn_gate_inp.weight': found shape"),
    ({"llama.expert_count": 0}, "expert_used_count: found 2, .*no such key"),
    ({"llama.expert_shared_count": 1}, "expert_shared_count: found 1"),
  ],
)
def test_damaged_keys(changed, message, tmp_path):
  metadata, tensors = mixtral()
  metadata = {k: v for k, v in (metadata | changed).items() if v is not None}
  write_gguf(tmp_path / "x.gguf", metadata, tensors)
  with pytest.raises(UserError, match=message):
    load_gguf(tmp_path / "x.gguf")
