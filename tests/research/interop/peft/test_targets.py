"""Configurations mean the modules that PEFT says they mean."""

import json
import pathlib

import chex
import pytest

from research.interop.peft import config as peft_config
from research.io.fields import Fields
from research.lora.methods.lora import LoRA
from research.typing import UserError

GOLDEN = json.loads(
  (pathlib.Path(__file__).parents[3] / "golden" / "peft_match.json").read_text()
)
MODULES = {name: name for name in GOLDEN["modules"]}


def read(**fields):
  fields = dict(r=8, lora_alpha=16, lora_dropout=0.0) | fields
  found = Fields(fields, "adapter_config.json")
  return peft_config.read_methods(found, LoRA, MODULES)


@pytest.mark.parametrize(
  "case", GOLDEN["cases"], ids=lambda case: str(case["fields"])
)
def test_as_peft_decides(case):
  if not case["adapted"]:
    with pytest.raises(UserError, match="target_modules"):
      read(**case["fields"])
    return
  specs = read(**case["fields"])
  got = {name: [s.rank, s.alpha] for name, s in specs.items()}
  chex.assert_trees_all_close(got, case["adapted"])


def test_all_linear_leaves_out_embedding_and_head():
  linears = {name for name in MODULES if name.startswith("model.layers.")}
  assert set(read(target_modules="All-Linear")) == linears


def test_without_targets_queries_and_values():
  assert set(read()) == set(read(target_modules=["q_proj", "v_proj"]))


def test_rslora_divides_by_the_root_of_each_rank():
  specs = read(use_rslora=True, rank_pattern={"q_proj": 16})
  assert specs["model.layers.0.self_attn.q_proj"].scale == 16 / 4
  assert specs["model.layers.0.self_attn.v_proj"].scale == 16 / 8**0.5


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(r=0), "r is 0, expected a whole number"),
    (dict(r=4.0), "r is 4.0"),
    (dict(lora_alpha="16"), "lora_alpha is '16'"),
    (dict(lora_dropout=1.0), "lora_dropout is 1.0"),
    (dict(target_modules=[1]), "target_modules is"),
    (dict(target_modules="("), "not a regular expression"),
    (dict(rank_pattern={"(": 2}), "not a regular expression"),
    (dict(rank_pattern={"q_proj": 0}), "rank_pattern: q_proj is 0"),
    (dict(layers_to_transform=["1"]), "layers_to_transform"),
    (dict(target_modules=".*", layers_to_transform=1), "layers_to_transform"),
  ],
)
def test_fields_of_the_wrong_kind(fields, message):
  with pytest.raises(UserError, match=message):
    read(**fields)
