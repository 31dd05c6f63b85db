"""Pairs whose right answer is known, and verdicts on what they teach."""

import copy

import numpy as np
import pytest

from experiments.studies.diffusion import alignment
from experiments.studies.diffusion.alignment import (
  APART,
  BEFORE,
  BEST,
  NAIVE,
)
from experiments.studies.diffusion.study import Tiny
from research.diffusion.alignment.preference import VRPO

STUDY = alignment.Preferences(
  tiny=Tiny(width=16, depth=1, heads=2, batch=4, every=2, warmup=1),
  base_steps=2,
  steps=2,
  pairs=64,
  rows=64,
  draws=4,
)


def test_pairs_are_a_right_answer_and_a_wrong_one():
  task, pairs = STUDY.targets, STUDY.paired("train", 500)
  tokens = np.asarray(pairs["tokens"])
  assert tokens.shape == (500, 2, task.length + 1)
  np.testing.assert_array_equal(tokens[:, 0, 0], tokens[:, 1, 0])
  assert task.right(tokens[:, 0]).all() and not task.right(tokens[:, 1]).any()
  assert (tokens[:, 1, 1:] < task.digits).all()
  want = [*[1] * task.length, 0]
  assert (np.asarray(pairs["weights"]) == want).all()
  other = STUDY.paired("heldout", 500)["tokens"]
  assert (np.asarray(other) != tokens).any()


@pytest.mark.slow
def test_margins_of_the_reference_itself_have_noise_where_masks_are_apart():
  task = STUDY.targets
  model, base = STUDY.tiny.load(task.mask_id + 1, 0)
  # The head of a fresh model is small: logits that matter.
  base = dict(base) | {"head": 30 * base["head"]}
  found = {}
  for kind, more in STUDY.kinds.items():
    goal = VRPO(
      model=model, mask_id=task.mask_id, reference=lambda _: base, **more
    )
    found[kind] = STUDY._noise(goal, base)
  assert found[BEST] == pytest.approx(0, abs=1e-5)
  # Four times have a quarter of the variance of one.
  assert 1.5 < found[NAIVE] / found[APART] < 2.7


@pytest.mark.slow
def test_an_arm_has_a_number_of_each_kind(monkeypatch):
  one = {BEST: STUDY.kinds[BEST]}
  kind = alignment.Preferences
  monkeypatch.setattr(kind, "kinds", property(lambda _: one))
  monkeypatch.setattr(kind, "_noise", lambda *_: 0.5)
  row = STUDY.run("seed 0", {}, None)
  assert row["noise"] == {BEST: 0.5}
  assert set(row["reward"]) == {BEFORE, BEST}
  assert all(0 <= x <= 1 for x in row["reward"].values())


def rows(best=0.6, naive=0.3, quiet=0.1):
  row = {
    "reward": {BEFORE: 0.2, BEST: best, APART: 0.4, NAIVE: naive},
    "noise": {BEST: quiet, APART: 0.5, NAIVE: 1.0},
  }
  return {arm: copy.deepcopy(row) for arm in STUDY.arms}


@pytest.mark.parametrize(
  ("more", "want"),
  [
    ({}, [True, True, True]),
    ({"best": 0.2, "naive": 0.1}, [False, True, True]),
    ({"naive": 0.6}, [True, False, True]),
    ({"quiet": 0.5}, [True, True, False]),
  ],
)
def test_verdicts(more, want, tmp_path):
  assert [v.holds for v in STUDY.verdicts(rows(**more))] == want
  assert len(STUDY.table(rows(**more))) == 4
  STUDY.plot(rows(), tmp_path, "preferences")
  assert (tmp_path / "preferences.png").read_bytes()[:4] == b"\x89PNG"


def test_seeds_that_differ_decide_nothing():
  found = rows()
  found["seed 0"]["reward"][BEST] = 0.2
  found["seed 1"]["reward"][BEST] = 0.25
  assert [v.holds for v in STUDY.verdicts(found)] == [None, None, True]
