"""Rows of `make bench`: how they are named; no test here measures time."""

import pytest

from tests.bench import bench, bench_start
from tests.experiments import test_start


@pytest.mark.parametrize("kind", ["help", "error"])
def test_every_command_has_a_row_of_how_soon_it_answers(kind):
  rows = {f"start_{kind}_{name}" for name in test_start.COMMANDS}
  assert rows <= set(bench_start.ROWS)
  assert all(map(bench_start.commands, rows))


def test_every_error_is_in_a_row():
  rows = [x for x in bench_start.ROWS if x.startswith("start_error_")]
  lines = [line for row in rows for line in bench_start.commands(row)]
  assert sorted(lines) == sorted(test_start.ERRORS | test_start.LATER)


def test_a_beginning_stands_for_all_its_rows():
  known = ["vlm", "vlm_tiny", "start_help_a", "start_help_b", "start_work_a"]
  assert bench.matching([], known) == known
  assert bench.matching(["vlm"], known) == ["vlm"]  # a row itself
  assert bench.matching(["start_help"], known) == known[2:4]
  assert bench.matching(["start", "start_work"], known) == known[2:]
  for name in ("star", "start_help_", "nope"):
    with pytest.raises(ValueError, match=f"no such row: {name}; there are vlm"):
      bench.matching([name], known)


def test_a_table_says_which_rows_miss_their_aims(monkeypatch):
  spent = {"train --help": 0.5, "plan --help": 1.01}
  monkeypatch.setattr(bench_start, "seconds", lambda x, kind: spent[x])
  found = bench_start.rows(["start_help_train", "start_help_plan"], "", 1)
  table = bench_start.show(found)
  assert "| start_help_train | 0.5 | 1 | yes | `train --help` |" in table
  assert table.endswith("Missed: start_help_plan.")


@pytest.mark.parametrize(
  ("command", "kind"),
  [("train --workdir={new}", "work"), ("train --help", "error")],
)
def test_an_answer_of_another_kind_is_no_measurement(command, kind):
  with pytest.raises(SystemExit, match=f"expected its {kind}, got"):
    bench_start.seconds(command, kind)
