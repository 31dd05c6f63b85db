"""PEFT's adapters on stacked experts compute here what they compute there."""

import dataclasses
import json
import shutil
import warnings

import numpy as np
import pytest

from research.interop import load, safetensors
from research.lora import peft, peft_config, peft_write, wrap
from research.typing import UserError
from tests.support_peft import MODELS, loaded, logits, relative

CASES = sorted(p.name for p in MODELS.glob("experts_lora_*"))


def thin(w):
  return dataclasses.replace(w, w=None)


def base():
  return load.load_model(MODELS / "mixtral")


@pytest.mark.parametrize("name", CASES)
def test_logits_are_pefts(name):
  with warnings.catch_warnings():
    warnings.simplefilter("error", RuntimeWarning)  # every pattern has matched
    it = load.load_model(MODELS / name)
  with np.load(MODELS / name / "golden.npz") as golden:
    tokens, want = golden["tokens"], golden["logits"]
  assert relative(logits(it.model, it.params, tokens), want) < 1e-5
  assert relative(logits(it.model, wrap.merge(it.params), tokens), want) < 1e-5
  plain = base()
  assert relative(logits(plain.model, plain.params, tokens), want) > 1e-3


def test_each_stack_has_its_rank_and_alpha():
  found = wrap.adapters(loaded("experts_lora_both").params, thin)
  got = {
    path: (w.method.rank, w.method.alpha)
    for path, w in found.items()
    if "experts" in path
  }
  want = {
    f"layers/{i}/mlp/experts/{part}": (4, 12.0)
    for i in range(3)
    for part in ("gate", "up", "down")
  }
  want["layers/0/mlp/experts/down"] = (3, 12.0)
  want |= {f"layers/2/mlp/experts/{p}": (4, 5.0) for p in ("gate", "up")}
  assert got == want
  found = wrap.adapters(loaded("experts_lora_down").params, thin)
  assert set(found) == {"layers/1/mlp/experts/down"}


def changed(tmp_path, fields=None, tensors=None):
  path = shutil.copytree(MODELS / "experts_lora_down", tmp_path / "a")
  file = path / peft_config.CONFIG
  file.write_text(json.dumps(json.loads(file.read_text()) | (fields or {})))
  if tensors:
    found = safetensors.open_file(path / peft.WEIGHTS)
    found = {k: np.array(x.read()) for k, x in found.items()}
    safetensors.write_file(path / peft.WEIGHTS, tensors(found))
  return path


@pytest.mark.parametrize(
  "fields, tensors, said",
  [
    (dict(target_parameters=["w1"]), None, "parameters of experts, not 'w1'"),
    (dict(target_parameters="w1"), None, "a list of names, or null"),
    (dict(target_parameters=[3]), None, "a list of names, or null"),
    (dict(lora_dropout=0.1), None, "null beside another method, or dropout"),
    (dict(r=3), None, "expected numbers [15, 20]"),
    (
      dict(target_parameters=["experts.down_proj"]),
      None,
      "missing: base_model.model.model.layers.0.mlp",
    ),
    (None, lambda t: {k: x * np.nan for k, x in t.items()}, "not finite"),
    (None, lambda t: t | {"more": np.ones(2, "f4")}, "1 superfluous: more"),
    (
      None,
      lambda t: {k: x * ("lora_A" in k) for k, x in t.items()},
      "changes nothing",
    ),
  ],
)
def test_what_does_not_fit(tmp_path, fields, tensors, said):
  path, it = changed(tmp_path, fields, tensors), base()
  with pytest.raises(UserError) as e:
    peft.load_adapter(path, it.params, it.model)
  assert said in str(e.value) and str(path) in str(e.value)


def test_none_is_written(tmp_path):
  it = loaded("experts_lora_down")
  with pytest.raises(UserError, match="no name for an adapter on stacked exp"):
    peft_write.save_adapter(tmp_path, it.params, it.model, "x")
