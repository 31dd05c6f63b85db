"""What llama.cpp asks of a file besides its numbers."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from research.interop import convert, gguf, load, parts, sources
from research.interop.gguf import config as gguf_config
from research.io import safetensors
from research.nn import rope
from research.quant.formats.ggml import GGML
from research.quant.quantize import Quantize
from research.typing import UserError
from tests import support

MODELS = pathlib.Path(__file__).parents[3] / "golden" / "models"


@pytest.mark.parametrize("kind", ["none", "no_vocab"])
def test_no_tokenizer_is_said_and_understood(kind, tmp_path):
  """Without the key llama.cpp opens no file; by its value it asks no more."""
  file = tmp_path / "model.gguf"
  source = sources.open_source(MODELS / "llama")
  assert convert.to_gguf(source, file)[1] == ""
  written = gguf.open_gguf(file)
  assert written.metadata["tokenizer.ggml.model"] == "none"
  # Of that size llama.cpp makes its vocabulary of tokens without texts.
  assert written.metadata["llama.vocab_size"] == source.model.vocab_size
  theirs = tmp_path / "theirs.gguf"
  metadata = written.metadata | {"tokenizer.ggml.model": kind}
  gguf.write_gguf(theirs, metadata, written.tensors)
  convert.to_orbax(sources.open_source(theirs), tmp_path / "ours")
  for path in (theirs, tmp_path / "ours"):
    assert load.load_model(path).tokenizer is None
  convert.to_hf(sources.open_source(tmp_path / "ours"), tmp_path / "hf")
  want = safetensors.open_directory(MODELS / "llama")
  got = safetensors.open_directory(tmp_path / "hf")
  assert got.keys() == want.keys()
  for name, x in want.items():
    np.testing.assert_array_equal(got[name].read(), x.read())
  convert.to_gguf(sources.open_source(tmp_path / "ours"), tmp_path / "again")
  assert gguf.open_gguf(tmp_path / "again").metadata == metadata


BIAS = {
  f"model.layers.{i}.self_attn.{x}_proj.bias": np.ones(n, np.float32)
  for i in range(3)
  for x, n in dict(q=40, k=8, v=8, o=30).items()
}
UNKNOWN = {  # of models with what llama.cpp knows in other architectures only
  "gemma2": (
    dict(tie_word_embeddings=False),
    {"lm_head.weight": np.ones((67, 30), np.float32)},
    "output.weight: llama.cpp has none in architecture 'gemma2'",
  ),
  "qwen3": (dict(attention_bias=True), BIAS, "attn_output.bias: llama.cpp has"),
  "qwen2": (
    dict(
      rope_theta=500.0,
      rope_scaling=json.loads((MODELS / "llama3/config.json").read_text())[
        "rope_scaling"
      ],
    ),
    {},
    "rope_freqs.weight: llama.cpp has none in architecture 'qwen2'",
  ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_no_file_is_written_that_llama_cpp_would_not_open(name, tmp_path):
  more, weights, message = UNKNOWN[name]
  folder = tmp_path / "model"
  folder.mkdir()
  config = json.loads((MODELS / name / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | more))
  stored = safetensors.open_directory(MODELS / name)
  known = {k: t.read() for k, t in stored.items()}
  safetensors.write_file(folder / "model.safetensors", known | weights)
  with pytest.raises(UserError, match=message):
    convert.to_gguf(sources.open_source(folder), tmp_path / "x.gguf")
  assert [p.name for p in tmp_path.iterdir()] == ["model"]


def source_of(model):
  params = support.params(model)
  return sources.Source(
    model=model,
    parts=parts.from_params(params),
    params=lambda: params,
    origin={},
  )


@pytest.mark.parametrize("format", [None, GGML(kind="Q8_0")])
def test_queries_take_a_scale_that_no_key_can_hold(format, tmp_path):
  """Plain ones, and blocks of the type that they are stored in."""
  model = support.model("gemma2", attention_scale=64**-0.5, local_theta=None)
  params, tokens = support.params(model), support.tokens()
  if format is not None:
    params = Quantize(format=format, targets=["q"])(params)
  source = dataclasses.replace(
    source_of(model), parts=parts.from_params(params), params=lambda: params
  )
  convert.to_gguf(source, tmp_path / "x.gguf")
  loaded = load.load_model(tmp_path / "x.gguf")

  def logits(model, params):
    hidden, _ = model.apply({"params": params}, tokens)
    return np.asarray(model.apply({"params": params}, hidden, method="logits"))

  want = logits(model, params)
  error = logits(loaded.model, loaded.params) - want
  assert np.linalg.norm(error) < 0.01 * np.linalg.norm(want)


SCALED = {  # head size, theta, factor, original
  "Llama 3.1": (128, 5e5, 8.0, 8192),
  "Llama 3.2": (64, 5e5, 32.0, 8192),
  "no frequency on the ramp": (10, 1e4, 8.0, 32),
  "a factor that no float32 has": (16, 1e4, 3.3, 100),
  "none divided by all of the factor": (8, 10.0, 8.0, 64),
  "one on the ramp, the last": (4, 100.0, 8.0, 128),
  "none divided": (8, 10.0, 8.0, 4096),
  "all divided": (8, 1e4, 8.0, 4),
}


@pytest.mark.parametrize("name", SCALED)
def test_llama3s_rotations_come_back(name, tmp_path):
  """The factors of all frequencies; what made them, where they tell it."""
  dim, theta, factor, original = SCALED[name]
  scaling = rope.Llama3(factor=factor, low=1.0, high=4.0, original=original)
  model = support.model(
    head_dim=dim, theta=theta, scaling=scaling, depth=1, width=8, hidden=8
  )
  source = source_of(model)
  path = tmp_path / "x.gguf"
  convert.to_gguf(source, path)
  found = load.load_model(path).model.stack.blocks[0].attention.rope.scaling
  got, want = (x.frequencies(theta, dim, None)[0] for x in (found, scaling))
  np.testing.assert_allclose(got, want, rtol=1e-6)
  if name != "none divided":
    assert found == scaling
  # Files of other tools have the factors alone.
  file = gguf.open_gguf(path)
  plain = rope.inverse_frequencies(theta, dim)
  np.testing.assert_allclose(
    file.tensors["rope_freqs.weight"].decode(), plain / want, rtol=1e-6
  )
  metadata = {k: v for k, v in file.metadata.items() if "scaling" not in k}
  sizes = gguf_config.sizes_from_metadata(
    "x", gguf.GGUF(metadata, file.tensors)
  )[1]
  got = sizes.scaling.frequencies(theta, dim, None)[0]
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_other_bands_of_llama3s_rotation_are_refused(tmp_path):
  scaling = rope.Llama3(factor=8.0, low=2.0, high=4.0, original=32)
  model = support.model(scaling=scaling, depth=1)
  source = source_of(model)
  message = "bands low=2 and high=4, expected 1 and 4"
  with pytest.raises(UserError, match=message):
    convert.to_gguf(source, tmp_path / "x.gguf")


@pytest.mark.parametrize(
  ("name", "window"), [("mistral", 7), ("llama", None), ("gemma2", None)]
)
def test_a_window_that_llama_cpp_does_not_see_is_told(name, window, tmp_path):
  source = sources.open_source(MODELS / name)
  written = convert.to_gguf(source, tmp_path / "model.gguf")[2]
  assert written.window == window
