"""Adapters that bring whole weights: biases, saved modules, embeddings."""

import functools
import json
import shutil

import chex
import jax
import numpy as np
import pytest

from research import tree
from research.interop import load, peft
from research.interop.parts import from_params
from research.interop.peft import config as peft_config
from research.io import safetensors
from research.lora import adapt, wrap
from research.lora.methods.tokens import Tokens
from research.typing import UserError
from tests.support_peft import MODELS, loaded, logits, relative

CASES = sorted(p.name for p in MODELS.glob("peftfull_*"))
PREFIX = "base_model.model."


@functools.cache
def base(name):
  config = json.loads((MODELS / name / "adapter_config.json").read_text())
  return load.load_model(MODELS / name / config["base_model_name_or_path"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sample(20)
def test_logits_are_pefts(name):
  it = loaded(name)
  with np.load(MODELS / name / "golden.npz") as golden:
    tokens, want = golden["tokens"], golden["logits"]
  assert relative(logits(it.model, it.params, tokens), want) < 1e-5
  if it.model.vocab_size == base(name).model.vocab_size:
    # The adapter does something.
    b = base(name)
    assert relative(logits(b.model, b.params, tokens), want) > 1e-4
  assert relative(logits(it.model, wrap.merge(it.params), tokens), want) < 1e-5


def changed(it, base) -> set[str]:
  """Returns the addresses at which two models differ below the adapters."""
  theirs = from_params(base.params)
  out = set()
  for address, part in from_params(wrap.disable(it.params)).items():
    x = np.asarray(part.read())
    if address.path == "head" and base.model.tied:
      other = np.asarray(base.params["embed"]).T
    else:
      other = np.asarray(theirs[address].read())
    if x.shape != other.shape or not np.array_equal(x, other):
      out.add(str(address))
  return out


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sample(7)
def test_read_and_written_again(name, tmp_path):
  it, b = loaded(name), base(name)
  peft.save_adapter(
    tmp_path,
    it.params,
    it.model,
    "x",
    use_rslora="layers" in name,
    whole=changed(it, b),
    resized=it.model.vocab_size != b.model.vocab_size,
  )
  params, model = peft.open_adapter(tmp_path, b.params, b.model)
  assert model == it.model
  chex.assert_trees_all_equal(params, it.params)
  theirs = safetensors.open_file(MODELS / name / peft.WEIGHTS)
  ours = safetensors.open_file(tmp_path / peft.WEIGHTS)
  # PEFT repeats a targeted embedding's base, which is the base model's.
  copies = {k for k in theirs if k.endswith("base_layer.weight")}
  copies = set() if "grown" in name else copies
  assert set(ours) == set(theirs) - copies
  for key, tensor in ours.items():
    np.testing.assert_array_equal(tensor.read(), theirs[key].read())


def test_the_cases_cover_what_they_claim():
  assert loaded("peftfull_tied_embed").model.tied is False
  assert loaded("peftfull_tied_head").model.tied is False
  assert loaded("peftfull_tied_lora").model.tied is False
  assert loaded("peftfull_tied_both").model.tied
  assert loaded("peftfull_tied_lora_both").model.tied
  assert loaded("peftfull_resized_tied").model.tied
  assert loaded("peftfull_resized").model.vocab_size == 71
  assert loaded("peftfull_tokens_grown").model.vocab_size == 71
  for name, sides in (
    ("tokens", {"embed": (9, 3, 66)}),
    ("tokens_both", {"embed": (3, 66), "head": (7, 66, 4)}),
    ("tokens_tied", {"embed": (9, 3, 66)}),
    ("tokens_grown", {"embed": (67, 68, 69, 70)}),
    ("tokens_alone", {"embed": (9, 3, 66)}),
  ):
    it = loaded(f"peftfull_{name}")
    assert it.model.tied == (name not in ("tokens", "tokens_both"))
    top = {k: w for k, w in it.params.items() if k in ("embed", "head")}
    found = wrap.adapters(top, lambda w: w.method)
    assert {k: m.ids for k, m in found.items()} == sides


def test_rows_of_tokens_that_a_tied_head_has_otherwise(tmp_path):
  path = folder(tmp_path, "peftfull_tokens_grown")
  key = f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta"
  rewrite(path, lambda t: t.update({key: t[key] + 1}))
  assert "although they are tied" in message(path, "peftfull_tokens_grown")


@pytest.mark.parametrize(
  "ids, text",
  [
    ({"lm_head": [9, 3, 66]}, "to which it is tied"),
    ({"lm_head": [9], "embed_tokens": [9, 3, 66]}, "to which it is tied"),
  ],
)
def test_rows_of_tokens_of_one_side_of_two_that_are_tied(tmp_path, ids, text):
  path = folder(tmp_path, "peftfull_tokens_tied")
  file = path / peft_config.CONFIG
  fields = dict(trainable_token_indices=ids)
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))
  assert text in message(path, "peftfull_tokens_tied")


def test_rows_of_tokens_are_trained_beside_lora_and_survive(tmp_path):
  """As a recipe would: one transform after the other, then a file."""
  b = base("peftfull_tokens_tied")
  key = jax.random.key(0)
  params = adapt.Adapt()(b.params, key)
  params = adapt.Adapt(method=Tokens(ids=(5, 60)), targets=("embed",))(
    params, key
  )
  tokens = np.array([[5, 7, 60, 3]])
  want = logits(b.model, b.params, tokens)
  np.testing.assert_array_equal(logits(b.model, params, tokens), want)
  params = tree.map_paths(
    lambda p, x: x + 0.1 if "/trained/" in p else x, params
  )
  peft.save_adapter(tmp_path, params, b.model, "x")
  config = json.loads((tmp_path / peft_config.CONFIG).read_text())
  assert config["trainable_token_indices"] == {"model.embed_tokens": [5, 60]}
  again = peft.load_adapter(tmp_path, b.params, b.model)
  chex.assert_trees_all_equal(again, params)
  merged = wrap.merge(again)
  moved = np.abs(np.asarray(merged["embed"]) - b.params["embed"]).max(1)
  assert np.flatnonzero(moved).tolist() == [5, 60]


def folder(tmp_path, name):
  shutil.copytree(MODELS / name, tmp_path / name)
  return tmp_path / name


def rewrite(path, change):
  path = path / peft.WEIGHTS
  tensors = {k: v.read().copy() for k, v in safetensors.open_file(path).items()}
  change(tensors)
  safetensors.write_file(path, tensors)


def message(path, name):
  b = base(name)
  with pytest.raises(UserError) as e:
    peft.open_adapter(path, b.params, b.model)
  assert str(e.value).startswith(str(path))
  assert len(str(e.value).split("\n")) <= 3
  return str(e.value)


def drop(key):
  return lambda tensors: tensors.pop(PREFIX + key)


@pytest.mark.parametrize(
  "name, change, text",
  [
    (
      "peftfull_saved",
      drop("layers.1.mlp.up_proj.weight".replace("layers", "model.layers")),
      "1 missing: base_model.model.model.layers.1.mlp.up_proj.weight",
    ),
    (
      "peftfull_bias_lora",
      drop("model.layers.0.self_attn.q_proj.base_layer.bias"),
      "1 missing",
    ),
    (
      "peftfull_resized",
      drop("lm_head.weight"),
      "an embedding of 71 tokens and no head",
    ),
    (
      "peftfull_resized_tied",
      lambda t: t.update({PREFIX + "lm_head.weight": np.ones((71, 36), "f4")}),
      "although the embedding is tied",
    ),
    (
      "peftfull_saved",
      lambda t: t.update({PREFIX + "model.norm.weight": np.ones(39, "f4")}),
      "final_norm/scale has shape [39], expected [40]",
    ),
    (
      "peftfull_saved",
      lambda t: t.update({PREFIX + "model.norm.weight": np.ones(40, "i4")}),
      "stored as int32",
    ),
    (
      "peftfull_saved",
      lambda t: t.update(
        {PREFIX + "model.layers.0.mlp.up_proj.weight": np.ones((44, 40), "f4")}
      ),
      "1 superfluous",
    ),
  ],
)
def test_what_does_not_fit(tmp_path, name, change, text):
  path = folder(tmp_path, name)
  rewrite(path, change)
  assert text in message(path, name)


@pytest.mark.parametrize(
  "fields, text",
  [
    (dict(bias="some"), "bias is 'some', expected one of none, all, lora_only"),
    (dict(modules_to_save="norm"), "modules_to_save is 'norm'"),
    (dict(modules_to_save=[""]), "modules_to_save"),
    (dict(modules_to_save=["(", "lm_head"]), "not a regular expression"),
  ],
)
def test_fields_that_cannot_be_honoured(tmp_path, fields, text):
  path = folder(tmp_path, "peftfull_saved")
  file = path / peft_config.CONFIG
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))
  b = base("peftfull_saved")
  with pytest.raises(UserError) as e:
    peft.open_adapter(path, b.params, b.model)
  assert text in str(e.value)


@pytest.mark.slow
def test_parameters_alone_are_not_enough_where_the_model_changes():
  b = base("peftfull_tied_head")
  with pytest.raises(UserError, match="change the model's"):
    peft.load_adapter(MODELS / "peftfull_tied_head", b.params, b.model)
