"""Adapters under the names that diffusion models' own code has.

The goldens are PEFT's, of modules called what the checkpoints' tensors are.
"""

import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from research import tree
from research.interop import convert, load, peft, sources
from research.interop.peft import config as peft_config
from research.interop.peft import names as peft_names
from research.lora import adapt, wrap
from research.lora.methods.lora import LoRA
from research.nn.time_embedding import TimeEmbedding
from research.typing import UserError
from tests import support

GOLDEN = pathlib.Path(__file__).parents[3] / "golden"
BASES, ADAPTERS = GOLDEN / "diffusion", GOLDEN / "diffusion_peft"
NAMES = sorted(p.name for p in ADAPTERS.iterdir())


def tensors(folder, file=peft.WEIGHTS):
  return safetensors.numpy.load_file(folder / file)


def base_of(name):
  config = json.loads((ADAPTERS / name / peft_config.CONFIG).read_text())
  return (ADAPTERS / name / config["base_model_name_or_path"]).resolve()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.sample(3)
def test_merged_it_is_what_peft_merges(name, tmp_path):
  """And all else of the checkpoint as it was."""
  with np.load(ADAPTERS / name / "merged.npz") as file:
    want = dict(file)
  convert.to_hf(sources.open_source(ADAPTERS / name), tmp_path / "a")
  got = tensors(tmp_path / "a", "model.safetensors")
  before = tensors(base_of(name), "model.safetensors")
  assert got.keys() == before.keys() and want.keys() <= got.keys()
  for key, x in got.items():
    if key in want:
      scale = np.abs(want[key]).max()
      # A product of rank 2 and a sum, in fp32.
      np.testing.assert_allclose(x, want[key], rtol=0, atol=1e-6 * scale)
      assert np.abs(x - before[key]).max() > 1e-2 * scale
    else:
      assert x.tobytes() == before[key].tobytes()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.sample(2)
def test_it_comes_back_as_peft_wrote_it(name, tmp_path):
  loaded = load.load_model(ADAPTERS / name)
  base = load.load_model(base_of(name))
  peft.save_adapter(
    tmp_path,
    loaded.params,
    loaded.model,
    "x",
    naming=peft_names.naming_of_source(base.source),
  )
  old, new = tensors(ADAPTERS / name), tensors(tmp_path)
  assert old.keys() == new.keys()
  for key, x in old.items():
    assert x.tobytes() == new[key].tobytes() and x.shape == new[key].shape
  said, written = (
    json.loads((folder / peft_config.CONFIG).read_text())
    for folder in (ADAPTERS / name, tmp_path)
  )
  for field in ("target_modules", "r", "lora_alpha", "peft_type"):
    assert written[field] == said[field], field


@pytest.mark.parametrize("name", ["llada_attention", "dream", "llada_moe"])
def test_convert_names_modules_as_the_base_does(name, tmp_path):
  convert.to_peft(sources.open_source(ADAPTERS / name), tmp_path / "a")
  assert tensors(tmp_path / "a").keys() == tensors(ADAPTERS / name).keys()


def test_a_feed_forward_s_name_does_not_mean_the_head(tmp_path):
  """`ff_out` alone would be the head's, too."""
  loaded = load.load_model(BASES / "llada")
  add = adapt.Adapt(method=LoRA(rank=2), targets=("mlp/down",))
  params = add(loaded.params, jax.random.key(0))
  params = tree.map_paths(
    lambda path, x: x + 1 if path.endswith("/b") else x, params
  )
  naming = peft_names.naming_of_source(loaded.source)
  base = str(BASES / "llada")
  peft.save_adapter(tmp_path, params, loaded.model, base, naming=naming)
  modules = [f"model.transformer.blocks.{i}.ff_out" for i in range(2)]
  said = json.loads((tmp_path / peft_config.CONFIG).read_text())
  assert said["target_modules"] == modules
  found = {
    f"base_model.model.{m}.lora_{x}.weight" for m in modules for x in "AB"
  }
  assert tensors(tmp_path).keys() == found
  again = load.load_model(tmp_path)
  assert wrap.adapters(again.params, lambda w: w).keys() == {
    "layers/0/mlp/down",
    "layers/1/mlp/down",
  }


def test_an_adapter_under_llamas_names_is_still_read(tmp_path):
  loaded = load.load_model(ADAPTERS / "llada_attention")
  base = str(BASES / "llada")
  peft.save_adapter(tmp_path, loaded.params, loaded.model, base)
  assert all(".model.layers." in key for key in tensors(tmp_path))
  again = load.load_model(tmp_path)
  for a, b in zip(
    jax.tree.leaves(again.params), jax.tree.leaves(loaded.params), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_a_part_of_a_module_has_no_name(tmp_path):
  loaded = load.load_model(BASES / "llada2")
  add = adapt.Adapt(method=LoRA(rank=2), targets=("attention/q",))
  params = add(loaded.params, jax.random.key(0))
  naming = peft_names.naming_of_source(loaded.source)
  with pytest.raises(UserError, match="queries, keys and values in one"):
    peft.save_adapter(tmp_path, params, loaded.model, "x", naming=naming)


def test_what_tells_a_model_the_time_has_no_name(tmp_path):
  model = support.model(
    depth=1, time_embedding=TimeEmbedding(features=8, hidden=8, width=8)
  )
  params = support.params(model)

  def save(target):
    add = adapt.Adapt(method=LoRA(rank=2), targets=(target,))
    found = add(params, jax.random.key(0))
    peft.save_adapter(tmp_path, found, model, "x")

  save("attention/q")
  (a, b) = sorted(tensors(tmp_path))
  assert a.endswith("q_proj.lora_A.weight") and b.endswith("lora_B.weight")
  with pytest.raises(UserError, match="only our files have"):
    save("clock/enter")


def test_gemma_4_s_table_of_layers_inputs_is_an_embedding(tmp_path):
  """In transformers it is one, of which PEFT adapts rows."""
  model = support.gemma4(vocab=24, per_layer=4, per_layer_vocab=24)
  params = support.params(model)
  method = adapt.Adapt(method=LoRA(rank=2), targets=("per_layer/embed",))
  new = method(params, jax.random.key(0))
  trained = new["per_layer"]["embed"].trained
  assert not trained["a"].any() and trained["b"].all()
  moved = tree.map_paths(lambda p, x: x + 0.1 if "/trained/" in p else x, new)
  peft.save_adapter(tmp_path, moved, model, "x")
  start = "base_model.model.model.embed_tokens_per_layer.lora_embedding_"
  found = tensors(tmp_path)
  assert {k: x.shape for k, x in found.items()} == {
    f"{start}A": (2, 24),
    f"{start}B": (8, 2),
  }
  again = peft.load_adapter(tmp_path, params, model)
  jax.tree.map(np.testing.assert_array_equal, again, moved)
