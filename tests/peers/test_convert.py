"""What we export, opened by transformers, PEFT and gguf's own reader."""

import json

import families
import gguf
import make_models
import make_peft
import make_peft_full
import numpy as np
import peft
import pytest
import safetensors.numpy
import support
import torch
import transformers

MODELS = make_models.MODELS
READ = ["llama", "smollm2", "qwen2"]


def convert(heptad, source, to, form, *flags):
  return heptad.command(
    "convert",
    f"--from={source}",
    f"--to={to}",
    f"--format={form}",
    "--notypecheck",
    *flags,
  )


def loaded(folder, **options):
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, attn_implementation="eager", dtype=torch.float32, **options
  ).eval()


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma2", "gemma3"])
def test_transformers_opens_our_directory(name, heptad, tmp_path):
  convert(heptad, MODELS / name, tmp_path / "ours", "orbax")
  convert(heptad, tmp_path / "ours", tmp_path / "hf", "hf", "--shard_size=20kB")
  want = np.load(MODELS / name / "golden.npz")
  got = make_models.logits(loaded(tmp_path / "hf"), want)
  assert support.relative_error(got, want["logits"]) < 1e-5


@pytest.mark.parametrize("name", READ)
def test_gguf_is_read_alike_by_both_peers(name, heptad, tmp_path):
  file = tmp_path / "model.gguf"
  convert(heptad, MODELS / name, file, "gguf:F32")
  tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
  weights = make_models.weights(families.FAMILIES[name])
  assert len(tensors) == len(weights)
  stored = np.array(tensors["token_embd.weight"].data)
  np.testing.assert_array_equal(stored, weights["model.embed_tokens.weight"])
  # Its reader wants a tokenizer; weights alone are compared through ours.
  convert(heptad, file, tmp_path / "hf", "hf")
  want = np.load(MODELS / name / "golden.npz")
  got = make_models.logits(loaded(tmp_path / "hf"), want)
  assert support.relative_error(got, want["logits"]) < 1e-5


def test_transformers_reads_our_gguf(heptad, tmp_path):
  """Its reader undoes the order of rows by itself; tokenizer included."""
  source = MODELS / "gguf_f32" / "model.gguf"
  convert(heptad, source, tmp_path / "hf", "hf")
  convert(heptad, tmp_path / "hf", tmp_path / "model.gguf", "gguf:Q8_0")
  model = loaded(tmp_path, gguf_file="model.gguf")
  want = loaded(tmp_path / "hf")
  rows = np.load(MODELS / "gguf_f32" / "golden.npz")["tokens"]
  ids = torch.from_numpy(rows).long()
  with torch.no_grad():
    a, b = model(ids).logits.numpy(), want(ids).logits.numpy()
  assert 1e-5 < support.relative_error(a, b) < 0.05  # eight bits
  cases = json.loads((MODELS / "gguf_tokenizer.json").read_text())
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
  for case in cases:
    assert (
      tokenizer.encode(case["text"], add_special_tokens=False) == (case["ids"])
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "F16", "BF16"])
def test_blocks_are_the_gguf_packages(kind, heptad, tmp_path):
  file = tmp_path / "x.gguf"
  source = MODELS / "gguf_f32" / "model.gguf"
  convert(heptad, source, file, f"gguf:{kind}")
  which = gguf.GGMLQuantizationType[kind]
  old = {t.name: t for t in gguf.GGUFReader(source).tensors}
  for tensor in gguf.GGUFReader(file).tensors:
    x = np.array(old[tensor.name].data)
    if x.ndim == 1:
      np.testing.assert_array_equal(np.array(tensor.data), x)
      continue
    assert tensor.tensor_type == which
    want = gguf.quants.quantize(x, which)
    got = np.array(tensor.data)
    np.testing.assert_array_equal(
      got.view(np.uint8).reshape(-1), want.view(np.uint8).reshape(-1)
    )


@pytest.mark.parametrize("name", make_peft_full.CASES)
def test_peft_opens_our_adapter(name, heptad, tmp_path):
  convert(heptad, MODELS / name, tmp_path / "ours", "orbax")
  convert(heptad, tmp_path / "ours", tmp_path / "adapter", "peft")
  case = make_peft_full.CASES[name]
  got = make_peft_full.logits(case, tmp_path / "adapter")
  want = np.load(MODELS / name / "golden.npz")["logits"]
  assert support.relative_error(got, want) < 1e-6


@pytest.mark.parametrize("name", ["peft_patterns", "peftfull_tied_lora"])
def test_merged_as_peft_merges(name, heptad, tmp_path):
  convert(heptad, MODELS / name, tmp_path / "merged", "hf")
  golden = np.load(MODELS / name / "golden.npz")
  ids = torch.from_numpy(golden["tokens"]).long()
  with torch.no_grad():
    got = loaded(tmp_path / "merged")(ids).logits.numpy()
  assert support.relative_error(got, golden["logits"]) < 1e-5


def test_an_adapter_keeps_every_bit(heptad, tmp_path):
  name = "peft_rslora"
  convert(heptad, MODELS / name, tmp_path / "a", "peft", "--rslora")
  file = "adapter_model.safetensors"
  a, b = (
    safetensors.numpy.load_file(f / file)
    for f in (MODELS / name, tmp_path / "a")
  )
  assert set(a) == set(b)
  for key, value in a.items():
    np.testing.assert_array_equal(value, b[key])
  family = families.FAMILIES[make_peft.BASE]
  base = make_models.build(family.config, make_models.weights(family))
  peft.PeftModel.from_pretrained(base, tmp_path / "a")
