"""The study of rounded activations: a tiny model's rows, its verdicts."""

import dataclasses

import pytest

from experiments.core import config, from_scratch
from experiments.studies import protocol
from experiments.studies.quant import activation_study
from research.nn import presets
from research.quant.reports import input_errors
from research.typing import UserError
from tests.support_letters import Letters, Text

STUDY = activation_study.ActivationErrors(
  model=from_scratch.FromScratch(
    sizes=presets.Sizes(
      vocab=64, width=32, depth=2, heads=2, kv_heads=1, head_dim=8, hidden=32
    ),
    tokenizer=Letters(),
  ),
  text=Text(2, 40),
  matrices=("layers/1/mlp/down", "layers/0/attention/q"),
  tokens=24,
)


@pytest.mark.slow
def test_arms_are_matrices_in_the_order_asked_for(tmp_path):
  shared = STUDY.prepare(tmp_path)
  assert STUDY.arms == list(STUDY.matrices)
  rows = {arm: STUDY.run(arm, {}, shared) for arm in STUDY.arms}
  for address, row in rows.items():
    inputs, matrix = shared[address]
    assert inputs.shape == (24, 32) and matrix.shape[0] == 32
    assert tuple(row) == input_errors.COLUMNS
    assert row["A8 token"] < row["A4 token"]
  assert [line["matrix"] for line in STUDY.table(rows)] == STUDY.arms
  assert len(STUDY.verdicts(rows)) == 3


def test_an_arm_is_of_its_model_and_text():
  more = dataclasses.replace(STUDY, matrices=STUDY.matrices[:1])
  longer = dataclasses.replace(STUDY, tokens=25)
  arm = STUDY.arms[0]
  assert STUDY.settings(arm) == more.settings(arm) != longer.settings(arm)


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"matrices": ("layers/9/mlp/down",)}, "no such matrix"),
    ({"tokens": 1}, "expected at least 2"),
  ],
)
def test_what_cannot_be_measured(tmp_path, change, says):
  with pytest.raises(UserError, match=says):
    dataclasses.replace(STUDY, **change).prepare(tmp_path)


def test_verdicts_can_be_negative():
  good = {name: 0.01 for name in input_errors.COLUMNS}
  good |= {"A8 tensor": 0.9, "A4 token": 0.5, "A8 tensor smooth": 0.1}
  address = "layers/0/attention/q"
  assert [v.holds for v in STUDY.verdicts({address: good})] == [True] * 3
  bad = good | {"A8 tensor": 0.1, "A4 rotated": 0.4}
  assert [v.holds for v in STUDY.verdicts({address: bad})] == [False] * 3
  # Inputs of `down` come from no norm.
  _, only = STUDY.verdicts({"layers/0/mlp/down": good})
  assert only.claim.startswith("a rotation")


def test_the_run_file_has_the_matrices_of_the_page():
  run = config.read("runs/quant/activation_errors.gin", root=protocol.Run)
  assert len(run.experiment.study.arms) == 6
