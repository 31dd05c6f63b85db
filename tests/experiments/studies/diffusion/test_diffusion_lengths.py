"""Lengths that a canvas finds: which there are to find, and the verdicts."""

import copy

import numpy as np
import pytest

from experiments.studies.diffusion.lengths import Lengths
from experiments.studies.diffusion.study import Tiny
from experiments.studies.diffusion.tasks import Walks
from research.diffusion.sampling.config import Growth

STUDY = Lengths()


def test_answers_to_a_question_are_as_long_as_told():
  rows = STUDY.walks.rows("train", 20_000)
  found = STUDY.walks.lengths(rows)
  for (start, goal), want in zip(
    STUDY.endpoints, STUDY.mean_lengths, strict=True
  ):
    mine = found[(rows[:, 0] == start) & (rows[:, 1] == goal)]
    error = mine.std() / np.sqrt(len(mine))
    assert abs(mine.mean() - want) < 4 * error
  # Around a ring of eight the other way is as far from four on.
  assert STUDY.endpoints[:3].tolist() == [[0, 1], [0, 2], [0, 3]]
  assert STUDY.distances[:7].tolist() == [1, 2, 3, 4, 3, 2, 1]
  # With both ways to a goal at distance d of n: d (n - d) steps, if none of
  # them were left out for its length.
  long = Lengths(walks=Walks(nodes=4, length=400))
  np.testing.assert_allclose(
    long.mean_lengths, long.distances * (4 - long.distances), rtol=1e-3
  )


@pytest.mark.slow
def test_an_arm(tmp_path):
  small = Lengths(
    walks=Walks(nodes=4, length=8), steps=2, seeds=1,
    tiny=Tiny(width=16, depth=1, heads=2, batch=2, every=2, warmup=1),
    growth=Growth(start=2, by=2, window=2, ends=0, low_threshold=0.0),
  )  # fmt: skip
  rows = {"seed 0": small.run("seed 0", {}, None)}
  row = rows["seed 0"]
  assert len(row["canvas"]) == len(row["want"]) == 2
  assert all(2 <= x <= 8 for x in row["canvas"])
  assert row["grown"]["length"] <= 8 and row["grown"]["calls"] > 1
  assert len(small.table(rows)) == 2 + 2
  assert len(small.verdicts(rows)) == 4
  small.plot(rows, tmp_path, "lengths")
  assert (tmp_path / "lengths.png").read_bytes()[:4] == b"\x89PNG"


def found(canvas=(5, 9, 12, 12), alike=0.9, calls=9.0, valid=0.1):
  row = {
    "canvas": list(canvas),
    "want": [5.4, 9.3, 11.9, 12.5],
    "alike": alike,
    "grown": {"valid": valid, "length": 3.0, "calls": calls},
    "fixed": {"valid": 0.1, "length": 3.0, "calls": 20.0},
  }
  return {arm: copy.deepcopy(row) for arm in STUDY.arms}


@pytest.mark.parametrize(
  ("changes", "number"),
  [
    (dict(alike=0.6), 0),
    (dict(canvas=(8, 9, 12, 12)), 1),
    (dict(canvas=(5, 9, 12, 8)), 1),
    (dict(calls=21.0), 2),
    (dict(valid=0.04), 3),
  ],
)
def test_verdicts_fall(changes, number):
  assert [v.holds for v in STUDY.verdicts(found())] == [True] * 4
  holds = [v.holds for v in STUDY.verdicts(found(**changes))]
  assert holds == [i != number for i in range(4)]


def test_seeds_that_differ_are_not_sure():
  rows = found()
  rows["seed 0"]["alike"] = 0.5
  rows["seed 1"]["grown"]["calls"] = 19.9
  rows["seed 2"]["grown"]["calls"] = 1.0
  rows["seed 2"]["grown"]["valid"] = 0.04
  holds = [v.holds for v in STUDY.verdicts(rows)]
  assert holds == [None, True, None, None]
  # As in the results: 5.2 ± 2.8 of 5.4 tokens.
  for arm, canvas in zip(STUDY.arms, (4.0, 5.4, 6.2), strict=True):
    rows[arm]["canvas"][0] = canvas
  assert STUDY.verdicts(rows)[1].holds is None
