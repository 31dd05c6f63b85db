"""What `--model=` takes, and what it says about everything else."""

import json
import os
import pathlib
import shutil
import socket

import chex
import jax
import jax.numpy as jnp
import pytest
import tokenizers
from flax import linen as nn

from research.interop import convert, load, native, sources, vision
from research.interop.hf import tokenizer as hf_tokenizer
from research.interop.loaded import Loaded, TokenizerOf
from research.io import safetensors
from research.quant import qtensor
from research.quant.formats.affine import Affine
from research.text.tokenizer import Tokenizer
from research.typing import UserError
from tests import support_lora, support_vlm

MODELS = pathlib.Path(__file__).parents[2] / "golden" / "models"


def message(name, **options) -> str:
  with pytest.raises(UserError) as e:
    load.load_model(name, **options)
  assert len(str(e.value).split("\n")) <= 3
  return str(e.value)


def test_a_directory_says_where_it_came_from():
  it = load.load_model(MODELS / "qwen2")
  assert it.tokenizer is None
  assert it.source["format"] == "hf"
  assert it.source["model_type"] == "qwen2"


@pytest.mark.parametrize("kind", ["hf", "vision", "orbax"])
def test_config_json_is_read_once(kind, tmp_path, monkeypatch):
  folder = MODELS / "llama" if kind == "hf" else tmp_path / "model"
  if kind == "orbax":
    convert.to_orbax(sources.open_source(MODELS / "llama"), folder)
  if kind == "vision":
    model, params = support_vlm.model(), support_vlm.params()
    vision.write_model(folder, Loaded(model, params, None, {}), params)
  read, files = safetensors.read_json, []

  def count(path, raw=None):
    files.append(pathlib.Path(path).name)
    return read(path, raw)

  monkeypatch.setattr(safetensors, "read_json", count)
  load.load_model(folder, towers="all")
  assert files.count("config.json") == 1


def test_a_checkpoint_of_ours_is_cast_and_decoded_as_asked():
  w = qtensor.pack(jnp.ones((64, 8), jnp.float32), Affine(bits=8, block=8))
  a, b = jnp.ones((2, 64)), jnp.ones((2, 8))
  params = {"norm": jnp.ones(3), "q": w, "k": support_lora.lora(w, a, b)}
  kept = native.cast(params, "bfloat16", packed=True)
  assert kept["q"] is w and kept["k"].w is w
  decoded = native.cast(params, "bfloat16", packed=False)
  for got in (decoded["q"], decoded["k"].w, decoded["norm"], kept["norm"]):
    assert isinstance(got, jax.Array) and got.dtype == jnp.bfloat16
  chex.assert_trees_all_close(decoded["q"].astype(float), w.dense(), rtol=0.01)
  assert decoded["k"].trained["a"].dtype == jnp.float32


def test_no_such_thing(tmp_path):
  assert "no such file or directory" in message(tmp_path / "nothing")
  assert "smollm2-135m" in message("not-a-model")


def test_directories_that_hold_no_model(tmp_path):
  assert "neither config.json" in message(tmp_path)
  (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
  assert "hidden_size is None" in message(tmp_path)
  (tmp_path / "config.json").write_text("{")
  assert "not valid JSON" in message(tmp_path)
  shutil.copy(MODELS / "llama" / "config.json", tmp_path)
  assert "no model.safetensors" in message(tmp_path)


@pytest.mark.parametrize(
  "config, found",
  [
    (dict(model_type="llava_llama", mm_vision_tower="clip"), "mm_projector"),
    (dict(model_type="llava", mm_vision_tower="clip"), "llava-hf/llava-1.5"),
    (dict(mp_pixel_shuffle_factor=2, vit_hidden_dim=768), "nanoVLM's own"),
  ],
)
def test_names_of_first_code_are_refused_by_name(config, found, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(config))
  assert found in message(tmp_path, towers="all")


def test_what_converts_says_that_towers_are_left_nowhere(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "llava"}')
  with pytest.raises(UserError, match="vision language .* GGUF included, have"):
    sources.open_source(tmp_path)


def test_a_truncated_file(tmp_path):
  folder = tmp_path / "llama"
  shutil.copytree(MODELS / "llama", folder)
  os.truncate(folder / "model.safetensors", 10_000)
  assert "model.safetensors: tensor" in message(folder)


def test_other_files_and_options(tmp_path):
  file = tmp_path / "model.pt"
  file.write_bytes(b"x")
  assert "expected a .gguf file" in message(file)
  assert "dtype is 'int4'" in message(MODELS / "llama", dtype="int4")
  assert "packed" in message(MODELS / "llama", packed=True)


def test_the_hub_when_it_cannot_be_reached(monkeypatch):
  hub = pytest.importorskip("huggingface_hub")

  def unreachable(name, **options):
    raise socket.gaierror(-2, "Name or service not known")

  monkeypatch.setattr(hub, "snapshot_download", unreachable)
  text = message("some-org/some-model")
  assert text.startswith("some-org/some-model: no such directory")
  assert "Name or service not known" in text


@pytest.fixture
def adapter(tmp_path):
  folder = tmp_path / "adapter"
  shutil.copytree(MODELS / "peft_lora", folder)
  return folder


def rename_base(folder, base):
  path = folder / load.ADAPTER_CONFIG
  config = json.loads(path.read_text()) | dict(base_model_name_or_path=base)
  path.write_text(json.dumps(config))


@pytest.mark.parametrize("where", ["absolute", "relative", "run"])
def test_an_adapter_finds_its_base(tmp_path, adapter, where):
  if where == "absolute":
    rename_base(adapter, str(MODELS / "llama"))
  else:
    shutil.copytree(MODELS / "llama", tmp_path / "llama")
  name = adapter
  if where == "run":
    (tmp_path / "config.gin").write_text("")
    name = tmp_path
  it = load.load_model(name)
  want = load.load_model(MODELS / "peft_lora")
  chex.assert_trees_all_equal(it.params, want.params)
  assert it.source["format"] == "peft"
  assert it.source["base"]["model_type"] == "llama"


def words(*added: str, **fields) -> Tokenizer:
  vocab = {c: i for i, c in enumerate("ab.<>tun")}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges=[]))
  backend.add_special_tokens(list(added))
  return Tokenizer(backend=backend, **fields)


@pytest.mark.parametrize("where", ["base", "adapter", "both"])
def test_an_adapter_has_the_tokenizer_beside_it(tmp_path, adapter, where):
  """As PEFT: `AutoPeftModel` asks that one how many embeddings there are."""
  base = tmp_path / "llama"
  shutil.copytree(MODELS / "llama", base)
  old = words("<t>", eos=8, stop=(8, 5), chat_template="old")
  new = words("<t>", "<turn>", eos=8, stop=(8,), chat_template="new")
  if where != "adapter":
    hf_tokenizer.write(base, None, old)
  if where != "base":
    hf_tokenizer.write(adapter, None, new)
    (adapter / "generation_config.json").unlink()
  source = sources.open_source(adapter)
  convert.to_hf(source, tmp_path / "merged")
  for found in (
    load.load_model(adapter).tokenizer,
    source.tokenizer,
    load.load_model(tmp_path / "merged").tokenizer,
  ):
    want = old if where == "base" else new
    assert found.chat_template == want.chat_template
    assert found.encode("<turn>") == want.encode("<turn>")
    # What the base's generation_config.json says is of the weights.
    assert set(found.stop) == ({8} if where == "adapter" else {8, 5})


def test_an_adapter_without_a_usable_base(adapter):
  assert "its base: ../llama: no such file" in message(adapter)
  rename_base(adapter, ".")
  assert "is an adapter itself" in message(adapter)
  rename_base(adapter, None)
  assert "base_model_name_or_path is None" in message(adapter)


@pytest.mark.parametrize("inner", [".", "adapter"])
def test_an_adapter_of_an_adapter(inner, tmp_path, adapter):
  """Or of a run that has left one."""
  shutil.copytree(adapter, tmp_path / "other" / inner)
  (tmp_path / "other" / "config.gin").write_text("")
  rename_base(adapter, "../other")
  assert "is an adapter itself" in message(adapter)


def test_a_run_that_has_not_finished(tmp_path):
  (tmp_path / "config.gin").write_text("")
  assert "has not written" in message(tmp_path)


def test_a_tokenizer_comes_without_weights():
  class Source:
    """Asked for shapes, it reads nothing."""

    def __init__(self, tokenizer):
      self.tokenizer = tokenizer

    def load(self, shardings=None):
      pytest.fail("it reads the weights")

    def load_abstract(self):
      return Loaded(nn.Dense(1), {}, self.tokenizer, {})

  words = object()
  assert TokenizerOf(source=Source(words)).load() is words
  with pytest.raises(UserError, match="a model without a tokenizer"):
    TokenizerOf(source=Source(None)).load()
