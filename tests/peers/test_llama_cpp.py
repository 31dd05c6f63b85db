"""Every architecture and adapter that we export, computed by llama.cpp.

The truth is transformers' word in fp64: stored for the golden families, live
for others. Two things are llama.cpp's own:

- GELU is a table of half-precision numbers there, so Gemma's truth is
  transformers with such a table in its place. A number that fp32's rounding
  moves across two of the table's moves the logits by 1e-4 of their range.
- A llama has no windows: `llama.attention.sliding_window` is read by nobody,
  and Mistral sees all tokens. Up to the window's length that is the same.
"""

import dataclasses

import families
import llama
import make_models
import make_peft
import numpy as np
import pytest
import support
import torch

MODELS = make_models.MODELS
EXPORT = """
import pathlib, sys
from research.interop import convert, sources
from research.interop.gguf import recipe as gguf_recipe
for source, to in zip(sys.argv[1::2], sys.argv[2::2]):
  recipe = gguf_recipe.Recipe("F32")
  convert.to_gguf(sources.open_source(source), pathlib.Path(to), recipe)
"""
ADAPTERS = """
import pathlib, sys
from research.interop import convert, sources
for source, to in zip(sys.argv[1::2], sys.argv[2::2]):
  convert.to_gguf_adapter(sources.open_source(source), pathlib.Path(to))
"""
GOLDEN = (
  *("llama", "llama3", "llama_linear", "llama_yarn", "llama_biases"),
  *("smollm2", "mixtral", "qwen2", "qwen3"),
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)


def other(name: str, **config) -> families.Family:
  """Returns a golden family with another config, of rows of 40 tokens."""
  base = families.FAMILIES[name]
  return dataclasses.replace(
    base, config=base.config | config, shards=1, length=40
  )


# Depths that llama.cpp knows 27B by: logits are scaled by 18^-0.5, not 8^-0.5.
BIG = dict(hidden_size=36, num_attention_heads=2)
OTHERS = {
  "qwen2_yarn": other("qwen2", rope_scaling=YARN),
  "qwen3_yarn": other("qwen3", rope_scaling=YARN),
  "qwen3_moe": other("qwen3_moe", mlp_only_layers=[]),
  "gemma": other("gemma"),
  "gemma2": other("gemma2"),
  "gemma2_27b": other("gemma2", num_hidden_layers=46, **BIG),
  "gemma3": other("gemma3"),
  "gemma3_period": other(
    "gemma3", sliding_window_pattern=3, rope_local_base_freq=700.0
  ),
  "gemma3_local": other("gemma3", sliding_window_pattern=9),
  "gemma3_yarn": other("gemma3", rope_scaling=YARN),
  "gemma3_untied": other("gemma3", tie_word_embeddings=False),
  "gemma3_27b": other("gemma3", num_hidden_layers=62, **BIG),
}


class Table(torch.nn.Module):
  """GELU as ggml's CPU code has it: a table from halves to halves."""

  def forward(self, x):
    half = torch.nn.functional.gelu(x.half().float(), approximate="tanh")
    out = half.half().to(x.dtype)
    return torch.where(x <= -10, 0 * x, torch.where(x >= 10, x, out))


def built(family: families.Family) -> torch.nn.Module:
  """Returns transformers' model in fp64, with llama.cpp's GELU if with any."""
  tensors = make_models.weights(family)
  model = make_models.build(family.config, tensors, torch.float64)
  if "gelu" in family.config["hidden_act"]:
    for layer in model.model.layers:
      layer.mlp.act_fn = Table()
  return model


def computed(family: families.Family, rows: np.ndarray) -> np.ndarray:
  """Returns its logits [B, T, V]."""
  with make_models.float64(), torch.no_grad():
    return built(family)(torch.from_numpy(rows).long()).logits.numpy()


@pytest.fixture(scope="module")
def files(shared_heptad, tmp_path_factory):
  """Returns where our fp32 file of each model is, all written at once."""
  folder = tmp_path_factory.mktemp("exports")
  sources = {name: MODELS / name for name in (*GOLDEN, "mistral")}
  for name, family in OTHERS.items():
    sources[name] = folder / name
    make_models.save(folder / name, family, make_models.weights(family))
  found = {name: folder / f"{name}.gguf" for name in sources}
  pairs = (path for name in found for path in (sources[name], found[name]))
  shared_heptad.script(EXPORT, *pairs)
  return found


@pytest.mark.parametrize("name", GOLDEN)
def test_our_file_has_the_golden_logits(name, files):
  model = llama.opened(files[name])
  with np.load(MODELS / name / "golden.npz") as golden:
    rows = golden["tokens"], golden["attention_mask"], golden["logits"]
    for tokens, mask, want in zip(*rows, strict=True):
      real = mask.astype(bool)
      got = llama.logits(model, tokens[None, real])[0]
      assert support.relative_error(got, want[real]) < 1e-5


@pytest.mark.parametrize("name", OTHERS)
def test_our_file_has_transformers_logits(name, files):
  rows = np.random.default_rng(7).integers(3, families.VOCAB, (2, 40))
  got = llama.logits(llama.opened(files[name]), rows)
  # Gemma's: 7e-4 in 46 layers, 2e-4 in fewer. Another period, window or scale
  # is 1e-2 off at least.
  limit = 1e-3 if name.startswith("gemma") else 1e-5
  error = support.relative_error(got, computed(OTHERS[name], rows))
  assert error < limit


def test_mistral_has_no_window_there(files):
  with np.load(MODELS / "mistral" / "golden.npz") as golden:
    rows, want = golden["tokens"][:1], golden["logits"][:1]
  got = llama.logits(llama.opened(files["mistral"]), rows)
  window = families.FAMILIES["mistral"].config["sliding_window"]
  assert support.relative_error(got[:, :window], want[:, :window]) < 1e-5
  assert support.relative_error(got, want) > 0.1
  everywhere = computed(other("mistral", sliding_window=None), rows)
  assert support.relative_error(got, everywhere) < 1e-5


# Adapters --------------------------------------------------------------------

STORED = (  # over the golden llama: one form each, and the embedding's too
  *("peft_lora", "peft_rslora", "peft_patterns"),
  *("peftfull_layers", "peftfull_untied_lora"),
)
ATTENTION = make_peft.ALL_LINEAR[:4]
DRAWN = {  # Gemma's queries, or their norm, hold a scale that no key can say
  "qwen2_yarn": dict(target_modules=make_peft.ALL_LINEAR, use_rslora=True),
  "qwen3_moe": dict(target_modules=ATTENTION),
  "gemma2": dict(target_modules=make_peft.ALL_LINEAR),
  "gemma3": dict(target_modules=make_peft.ALL_LINEAR),
}


@pytest.fixture(scope="module")
def adapters(files, shared_heptad, tmp_path_factory):
  """Returns where our file of each adapter of PEFT is."""
  folder = tmp_path_factory.mktemp("adapters")
  sources = {name: MODELS / name for name in STORED}
  for name, options in DRAWN.items():
    family, sources[name] = OTHERS[name], folder / name
    model = make_models.build(family.config, make_models.weights(family))
    make_peft.wrap(model, name, **options).save_pretrained(folder / name)
    make_peft.settle(folder / name, str(files[name].with_suffix("")))
  found = {name: folder / f"{name}.gguf" for name in sources}
  pairs = (path for name in found for path in (sources[name], found[name]))
  shared_heptad.script(ADAPTERS, *pairs)
  return found


@pytest.mark.parametrize("name", STORED)
def test_our_adapter_is_pefts(name, files, adapters):
  model = llama.opened(files["llama"], lora_path=str(adapters[name]))
  with np.load(MODELS / name / "golden.npz") as golden:
    tokens, want = golden["tokens"], golden["logits"]
  assert support.relative_error(llama.logits(model, tokens), want) < 1e-5


@pytest.mark.parametrize("name", DRAWN)
def test_our_adapter_is_pefts_in_other_families(name, files, adapters):
  family, rows = OTHERS[name], make_peft.tokens()
  with make_models.float64(), torch.no_grad():
    model = make_peft.wrap(built(family), name, **DRAWN[name]).double()
    want = model(torch.from_numpy(rows).long()).logits.numpy()
  limit = 4e-4 if name.startswith("gemma") else 1e-5
  got = llama.opened(files[name], lora_path=str(adapters[name]))
  assert support.relative_error(llama.logits(got, rows), want) < limit
  # Without the adapter they are elsewhere.
  assert support.relative_error(computed(family, rows), want) > 50 * limit
