"""The committed goldens are what their scripts make of the peers installed."""

import json
import pathlib

import families
import make_bnb4
import make_gemma4
import make_gguf
import make_gguf_names
import make_hqq
import make_images
import make_llm_int8
import make_models
import make_molmo2
import make_peft
import make_peft_full
import make_prompts
import make_qwen_vl
import make_siglip2
import make_vision_masks
import make_vlm_generated
import numpy as np
import peft
import pytest
import support
import torch
import transformers

MODELS = make_models.MODELS
# fp64 rounded to fp32: half an ulp, and the last bits of another BLAS.
EXACT = 1e-6
# Not goldens but measurements of the run that made them.
MEASURED = ("fp32_error", "greedy_margin")


def stored(name: str) -> dict[str, np.ndarray]:
  with np.load(MODELS / name / "golden.npz") as file:
    return {k: file[k] for k in file.files if k not in MEASURED}


def regenerated(module, name, tmp_path, skip=()):
  """Makes a folder anew; compares arrays, and every other file by bytes."""
  made = {
    k: np.asarray(v)
    for k, v in module.make(name, tmp_path).items()
    if k not in MEASURED
  }
  support.assert_same_arrays(made, stored(name), EXACT)
  files = {p.name for p in (MODELS / name).iterdir()}
  assert {p.name for p in (tmp_path / name).iterdir()} == files
  for file in files - {"golden.npz", *skip}:
    old, new = MODELS / name / file, tmp_path / name / file
    assert old.read_bytes() == new.read_bytes(), file


@pytest.mark.parametrize("name", families.FAMILIES)
def test_family(name, tmp_path):
  # What transformers itself writes into config.json follows its version.
  saved = families.FAMILIES[name].saved_by_peer
  regenerated(make_models, name, tmp_path, ("config.json",) if saved else ())


@pytest.mark.parametrize("name", make_peft.ADAPTERS)
def test_adapter(name, tmp_path):
  regenerated(make_peft, name, tmp_path, ("adapter_config.json",))


@pytest.mark.parametrize("name", make_peft_full.CASES)
def test_adapter_with_whole_weights(name, tmp_path):
  regenerated(make_peft_full, name, tmp_path, ("adapter_config.json",))


@pytest.mark.parametrize("name", make_qwen_vl.FAMILIES)
def test_qwen_vl(name, tmp_path):
  made = make_qwen_vl.make(name, tmp_path)
  with np.load(make_qwen_vl.FOLDER / name / "golden.npz") as file:
    support.assert_same_arrays(made, dict(file), EXACT)


@pytest.mark.parametrize("name", make_gemma4.FAMILIES)
def test_gemma4(name, tmp_path):
  made = make_gemma4.make(name, tmp_path)
  with np.load(make_gemma4.FOLDER / name / "golden.npz") as file:
    support.assert_same_arrays(made, dict(file), EXACT)


@pytest.mark.parametrize("name", make_vlm_generated.PROCESSORS)
def test_vlm_generated(name, tmp_path):
  made = make_vlm_generated.make(name, tmp_path)
  with np.load(make_vlm_generated.FOLDER / name / "generated.npz") as file:
    support.assert_same_arrays(made, dict(file), EXACT)


@pytest.mark.parametrize("module", [make_siglip2, make_molmo2])
def test_siglip2_and_molmo2(module, tmp_path):
  made = module.make(tmp_path)
  with np.load(module.FOLDER / module.NAME / "golden.npz") as file:
    support.assert_same_arrays(made, dict(file), EXACT)


@pytest.mark.parametrize("name", make_gguf.FILES)
def test_gguf_file(name, tmp_path):
  regenerated(make_gguf, name, tmp_path)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_folder_is_one_that_transformers_loads(name):
  how = make_models.plain(families.FAMILIES[name].config)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    MODELS / name, dtype=torch.float32, **how
  ).eval()
  want = stored(name)
  got = make_models.logits(model, want)
  assert support.relative_error(got, want["logits"]) < 1e-5


@pytest.mark.parametrize("name", make_peft.ADAPTERS)
def test_adapter_is_one_that_peft_loads(name):
  family = families.FAMILIES[make_peft.BASE]
  base = make_models.build(family.config, make_models.weights(family))
  model = peft.PeftModel.from_pretrained(base, MODELS / name)
  want = stored(name)
  with torch.no_grad():
    got = make_peft.loss_and_logits(model, want["tokens"])[1].numpy()
  assert support.relative_error(got, want["logits"]) < 1e-5


@pytest.mark.parametrize("name", make_gguf.FILES)
def test_transformers_reads_the_same_weights_from_gguf(name):
  """Its own GGUF reader, un-permutation and all: a second opinion."""
  model = transformers.AutoModelForCausalLM.from_pretrained(
    MODELS / name, gguf_file="model.gguf", dtype=torch.float32
  )
  state, want = model.state_dict(), stored(name)
  for key, value in want.items():
    if key.startswith("w/"):
      got = state[key[2:]].numpy()
      np.testing.assert_allclose(got, value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
  "module", [make_bnb4, make_hqq, make_llm_int8, make_vision_masks]
)
def test_json_files(module):
  """Codes, scales and tables, byte by byte; masks, pair by pair."""
  script = pathlib.Path(module.__file__)
  name = script.stem.removeprefix("make_") + ".json"
  want = json.loads(script.with_name(name).read_text())
  assert json.loads(json.dumps(module.make())) == want


def test_gguf_encodings():
  want = json.loads((MODELS / "gguf_encodings.json").read_text())
  assert make_gguf.encodings() == want


def test_gguf_names():
  want = json.loads(make_gguf_names.FILE.read_text())
  # Newer releases of the package know more keys, types and kinds of files.
  for what, found in make_gguf_names.make().items():
    if isinstance(found, dict):
      assert found.items() >= want[what].items(), what
    else:
      assert set(found) >= set(want[what]), what


def test_gguf_tokenizer():
  cases = json.loads((MODELS / "gguf_tokenizer.json").read_text())
  assert [c["text"] for c in cases] == make_gguf.STRINGS
  for case in cases:
    assert make_gguf.tokenizer().encode(case["text"]).ids == case["ids"]


MATTERS = [
  ("llama", dict(rope_theta=500.0)),
  ("llama", dict(rms_norm_eps=1e-2)),
  ("llama3", dict(rope_scaling=None)),
  ("llama_linear", dict(rope_scaling=None)),
  ("llama_dynamic", dict(rope_scaling=None)),
  ("llama_yarn", dict(rope_scaling=None)),
  ("mistral", dict(sliding_window=None)),
  ("mistral", dict(sliding_window=8)),
  ("qwen2_window", dict(use_sliding_window=False)),
  ("qwen2_window", dict(max_window_layers=0)),
  ("gemma", dict(hidden_activation="silu", hidden_act="silu")),
  ("gemma2", dict(attn_logit_softcapping=None)),
  ("gemma2", dict(final_logit_softcapping=None)),
  ("gemma2", dict(query_pre_attn_scalar=8)),
  ("gemma2", dict(sliding_window=8)),
  ("gemma3", dict(query_pre_attn_scalar=8)),
  ("gemma3", dict(rope_local_base_freq=1e6)),
  ("gemma3", dict(rope_scaling=None)),
  ("gemma3", dict(sliding_window=8)),
  ("gemma3", dict(sliding_window_pattern=5)),
]


@pytest.mark.parametrize("name, change", MATTERS)
def test_golden_would_notice(name, change):
  """A reader that ignored the field would be far outside the tolerance."""
  family = families.FAMILIES[name]
  model = make_models.build(family.config | change, make_models.weights(family))
  want = stored(name)
  error = support.relative_error(
    make_models.logits(model, want), want["logits"]
  )
  assert error > 1e-3


def test_images():
  assert make_images.hashes() == json.loads(make_images.HASHES.read_text())
  with np.load(make_images.COUNTS) as file:
    support.assert_same_arrays(make_images.counts(), dict(file), 0)


@pytest.mark.parametrize("name", make_prompts.FAMILIES)
def test_prompts(name):
  with np.load(make_prompts.FILE) as file:
    want = {k: x for k, x in file.items() if k.split()[0] in (name, "size")}
  support.assert_same_arrays(make_prompts.make([name]), want, 0)
