"""Rules that match nothing, overlap, or change when they are saved."""

import json
import shutil
import warnings

import pytest

from research.interop import peft
from research.interop.peft import config as peft_config
from research.interop.peft import targets, validate
from research.typing import UserError
from tests.support_peft import MODELS, base

MODULES = [
  f"model.layers.{i}.{name}"
  for i in range(3)
  for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
] + ["model.embed_tokens", "lm_head"]
NORMS = ["model.norm", "model.layers.0.input_layernorm"]


def found(**config):
  config = dict(target_modules=["q_proj", "v_proj"]) | config
  out = validate.findings(config, MODULES, NORMS)
  return [(f.kind, f.field, f.rule) for f in out]


@pytest.mark.parametrize(
  "config",
  [
    dict(),
    dict(target_modules="all-linear"),
    dict(target_modules=None),
    dict(target_modules=r".*\.q_proj", exclude_modules=r".*\.1\..*"),
    dict(layers_to_transform=[0, 2], layers_pattern="layers"),
    dict(modules_to_save=["norm", "lm_head"]),
    dict(rank_pattern={"q_proj": 4, "v_proj": 8}),
    dict(rank_pattern={r"^model\.layers\.0\.self_attn\.q_proj": 4}),
  ],
)
def test_nothing_to_say(config):
  assert found(**config) == []


@pytest.mark.parametrize(
  "config, want",
  [
    (
      dict(target_modules=["q_proj", "qproj"]),
      [("nothing", "target_modules", "qproj")],
    ),
    (
      dict(target_modules=r"layers\.0\.q_proj"),
      [("nothing", "target_modules", r"layers\.0\.q_proj")],
    ),
    (
      dict(exclude_modules=["k_proj"]),
      [("nothing", "exclude_modules", "k_proj")],
    ),
    (
      dict(layers_to_transform=[1, 7]),
      [("nothing", "layers_to_transform", "7")],
    ),
    (
      dict(modules_to_save=["norms", "norm"]),
      [("nothing", "modules_to_save", "norms")],
    ),
    (
      dict(modules_to_save=["v_proj"]),
      [("hidden", "modules_to_save", "v_proj")],
    ),
    (
      # Down projections are there, but not adapted.
      dict(rank_pattern={"down_proj": 4}),
      [("nothing", "rank_pattern", "down_proj")],
    ),
    (
      dict(alpha_pattern={"layers.0.*": 4, "layers.0.self_attn.q_proj": 4}),
      [("overlap", "alpha_pattern", "layers.0.*")],
    ),
    (
      # "q_proj" comes first here and second once sorted.
      dict(rank_pattern={"q_proj": 4, "layers.0.*": 8}),
      [("order", "rank_pattern", "q_proj")],
    ),
    (
      dict(rank_pattern={"layers.0.*": 8, "q_proj": 4}),
      [("overlap", "rank_pattern", "layers.0.*")],
    ),
    (dict(rank_pattern={"(": 4}), [("invalid", "rank_pattern", "(")]),
  ],
)
def test_findings(config, want):
  assert found(**config) == want


def test_the_trap_is_one():
  """The patterns of an "order" finding do resolve differently once sorted."""
  patterns = {"q_proj": 4, "layers.0.*": 8}
  name = "model.layers.0.self_attn.q_proj"
  assert targets.by_pattern(name, patterns, 1, "x") == 4
  assert targets.by_pattern(name, dict(sorted(patterns.items())), 1, "x") == 8


def test_types():
  for config in (
    dict(target_modules=[1]),
    dict(layers_to_transform=["0"]),
    dict(rank_pattern=[1]),
  ):
    with pytest.raises(UserError, match="expected"):
      found(**config)


def test_adaloras_ranks_are_no_patterns():
  """There rank_pattern says which terms are left of each module."""
  pattern = {"model.layers.0.self_attn.q_proj.lora_E": [True]}
  assert found(peft_type="ADALORA", rank_pattern=pattern) == []


def told(folder, name, **fields):
  """Returns what loading an adapter with such fields warns of."""
  out = shutil.copytree(MODELS / name, folder / name)
  path = out / peft_config.CONFIG
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))
  with warnings.catch_warnings(record=True) as given:
    warnings.simplefilter("always")
    peft.load_adapter(out, base().params, base().model)
  rows = [w for w in given if w.category is RuntimeWarning]
  assert all(str(path) in str(w.message) for w in rows)
  return [str(w.message).removeprefix(f"{path}: ") for w in rows]


@pytest.mark.parametrize(
  "fields, want",
  [
    (dict(), []),
    # PEFT warns of these three,
    (
      dict(rank_pattern={"qproj": 2, "^layers.0.*": 4}),
      [
        "rank_pattern: 'qproj' matches no adapted module",
        "rank_pattern: '^layers.0.*' matches no adapted module",
      ],
    ),
    (
      dict(alpha_pattern={"lm_head": 2}),
      ["alpha_pattern: 'lm_head' matches no adapted module"],
    ),
    (
      dict(exclude_modules=["qproj"]),
      ["exclude_modules: 'qproj' matches no module of the base"],
    ),
    # and says nothing of this one.
    (
      dict(modules_to_save=["score"]),
      ["modules_to_save: 'score' matches no module of the base"],
    ),
  ],
)
def test_a_rule_that_matches_nothing_is_told_on_loading(tmp_path, fields, want):
  assert told(tmp_path, "peft_lora", **fields) == want


def test_patterns_that_are_none_are_not_told(tmp_path):
  assert told(tmp_path, "method_adalora_cut") == []
