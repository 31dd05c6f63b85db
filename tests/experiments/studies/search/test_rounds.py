"""Curves of rewards, read from what a run leaves."""

import json

import pytest

from experiments.studies.search import rounds
from experiments.studies.search.systems import System


def run(folder, **metrics):
  folder.mkdir()
  lines = [{"step": 0, "compile/seconds": 1.0}]
  for i in range(60):
    own = {f"train/{name}": value(i) for name, value in metrics.items()}
    lines.append({"step": i + 1, "loss": 0.0} | own)
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "metrics.jsonl").write_text(text)
  return rounds.curves_of(folder)


def test_curves_are_means_of_equal_parts(tmp_path):
  found = run(
    tmp_path / "a", reward=lambda i: i / 60, verified=lambda i: 1 - i / 60
  )["curves"]
  assert len(found["step"]) == rounds.POINTS
  assert found["step"][0] == 1.5 and found["reward"][0] == pytest.approx(
    1 / 120
  )
  assert found["verified"][-1] == pytest.approx(1 - 58.5 / 60)
  # Where the reward is the verdict, it stands for both.
  same = run(tmp_path / "b", reward=lambda i: i / 60)["curves"]
  assert same["verified"] == same["reward"]
  assert run(tmp_path / "c") == {}


def test_what_is_earned_stands_beside_what_is_right(tmp_path):
  row = run(tmp_path / "a", reward=lambda i: i / 60, verified=lambda i: 0.5)
  row |= {"answers": {"greedy": 0.25, "sampled": 0.125}}
  system, none = System(step="s", title="scores"), System(step="none")
  report = rounds.Optimized(systems=(system, none))
  rows = {system: [row], none: []}
  (line,) = report.lines(rows.get)
  assert line["reward"] == "scores"
  assert line["at last"] == pytest.approx(58.5 / 60)
  assert line["at last, %"] == 50 and line["sampled, %"] == 12.5
  report.plot(rows.get, tmp_path / "curve.png")
  assert (tmp_path / "curve.png").stat().st_size > 10_000
  report.plot({system: [], none: []}.get, tmp_path / "empty.png")
  assert not (tmp_path / "empty.png").exists()
