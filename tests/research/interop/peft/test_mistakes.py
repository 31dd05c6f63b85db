"""Adapters that are damaged, impossible or somebody else's are refused."""

import dataclasses
import functools
import json
import pathlib
import shutil

import numpy as np
import pytest

from research import tree
from research.interop import load, peft
from research.io import safetensors
from research.typing import UserError

MODELS = pathlib.Path(__file__).parents[3] / "golden" / "models"


@functools.cache
def base():
  return load.load_model(MODELS / "llama")


def changed(folder, name, fields=None, tensors=None):
  """Returns a copy of a golden adapter with other fields or tensors."""
  out = shutil.copytree(MODELS / name, folder / name)
  path = out / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | (fields or {})))
  if tensors is not None:
    found = safetensors.open_file(out / peft.WEIGHTS)
    found = {k: np.array(x.read()) for k, x in found.items()}
    safetensors.write_file(out / peft.WEIGHTS, tensors(found))
  return out


def read(folder):
  return peft.load_adapter(folder, base().params, base().model)


@pytest.mark.parametrize(
  "name, fields, said",
  [
    ("method_miss", dict(r=0), "r is 0, expected a whole number of at least 1"),
    ("method_loha", dict(alpha=-2), "alpha is -2, expected a number above 0"),
    ("method_loha", dict(alpha_pattern={"q": -1}), "q is -1, expected"),
    ("method_adalora", dict(init_r=0), "init_r is 0"),
    ("method_vera", dict(peft_type="VERAA"), "peft_type is 'VERAA', expected"),
    ("method_hra", dict(apply_GS=True), "apply_GS is True, expected None or"),
    ("method_oft", dict(coft=True), "coft is True"),
    ("method_oft", dict(block_share=True), "block_share is True"),
    ("method_boft", dict(boft_block_num=3), "boft_block_num is 3"),
    ("method_miss", dict(init_weights="bat"), "init_weights is 'bat'"),
    ("method_gralora", dict(hybrid_r=2), "hybrid_r is 2"),
    ("method_lokr", dict(rank_dropout=0.5), "rank_dropout is 0.5"),
    ("method_c3a", dict(block_size_pattern={"q": 2}), "block_size_pattern is"),
    ("method_kasa", dict(kasa_config=dict(beta=0)), "beta is 0"),
    ("method_kasa", dict(kasa_config=3), "kasa_config is 3, expected an obj"),
    ("method_vera", dict(bias="vera_only"), "bias is 'vera_only', expected"),
    ("method_tinylora", dict(weight_tying=0.5), "weight_tying is 0.5"),
    ("method_tinylora", dict(save_projection=False), "save_projection is"),
    ("method_tinylora", dict(u=6), "expected [6, 2, 2]"),
    ("method_alora", dict(alora_invocation_tokens=[]), "expected token ids"),
    ("method_alora", dict(alora_invocation_tokens="ab"), "expected token ids"),
    ("method_alora", dict(alora_invocation_tokens=[1, -1]), "token ids"),
    ("method_alora", dict(alora_invocation_tokens=[1] * 300), "token ids"),
    ("method_bdlora", dict(use_bdlora=True), "expected an object or null"),
    ("method_bdlora", dict(use_bdlora=dict(nblocks=0)), "nblocks is 0"),
    (
      "method_bdlora",
      dict(use_bdlora=dict(nblocks=2, target_modules_bd_a="q")),
      "expected a list of names",
    ),
    (
      "method_bdlora",
      dict(use_bdlora=dict(nblocks=2, target_modules_bd_a=["down"])),
      "names neither",
    ),
    ("method_delora", dict(r=2), "has shape [4, 40], expected [2, 40]"),
    ("method_adalora_cut", dict(rank_pattern=None), "expected [6, 40]"),
    (
      "method_adalora_cut",
      dict(rank_pattern={"model.layers.0.self_attn.q_proj.lora_E": [1, 0]}),
      "expected true or false for every term",
    ),
    (
      "method_adalora_cut",
      dict(rank_pattern={"model.layers.0.self_attn.q_proj.lora_E": [True]}),
      "has 1 terms for model.layers.0.self_attn.q_proj, expected init_r, 6",
    ),
  ],
)
def test_fields_that_cannot_be(name, fields, said, tmp_path):
  with pytest.raises(UserError) as e:
    read(changed(tmp_path, name, fields))
  assert said in str(e.value)
  assert len(str(e.value).splitlines()) <= 3


QUERY = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
  "name, key, value, said",
  [
    ("method_hira", "hira_B", np.nan, "not finite"),
    ("method_vera", "vera_lambda_d", np.inf, "not finite"),
    ("method_shira", "shira_indices", 40, "a position outside [40, 40]"),
    ("method_shira", "shira_indices", -1, "a position outside [40, 40]"),
    ("method_randlora", "randlora_A", 3.0, "which all modules share"),
  ],
)
def test_numbers_that_cannot_be(name, key, value, said, tmp_path):
  def broken(tensors):
    tensors[f"{QUERY}.{key}"].reshape(-1)[3] = value
    return tensors

  with pytest.raises(UserError) as e:
    read(changed(tmp_path, name, tensors=broken))
  assert said in str(e.value)


def test_whole_numbers_are_not_floats(tmp_path):
  def broken(tensors):
    key = f"{QUERY}.shira_indices"
    return tensors | {key: tensors[key].astype(np.float32)}

  with pytest.raises(UserError, match="float32, expected one of int32, int64"):
    read(changed(tmp_path, "method_shira", tensors=broken))


def test_ranks_that_peft_cannot_say(tmp_path):
  it = load.load_model(MODELS / "method_miss")

  def other(w):
    return dataclasses.replace(w, method=dataclasses.replace(w.method, rank=3))

  params = dict(it.params)
  first = next(iter(tree.runs(params)))
  layer = next(iter(params[first]))
  attention = dict(params[first][layer]["attention"])
  attention["q"] = other(attention["q"])
  params[first] = params[first] | {
    layer: params[first][layer] | {"attention": attention}
  }
  with pytest.raises(UserError, match="one method an adapter"):
    peft.save_adapter(tmp_path, params, it.model, "../llama")
