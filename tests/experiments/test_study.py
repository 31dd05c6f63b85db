"""The command of studies: what it stores, resumes, refuses, says and renders.

On a study without a model; those of each system have tests of their own.
"""

import functools
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from experiments import study
from experiments.core import cli, config
from experiments.studies import protocol, results
from research.training import preemption
from research.typing import UserError
from tests.experiments import fake_study

GIN = """
from __gin__ import dynamic_registration
from experiments.studies import protocol
from tests.experiments import fake_study

protocol.Run.study = @fake_study.Coins()
fake_study.Coins.tosses = 10
"""

STUDIES = sorted(
  str(p.relative_to(config.CONFIGS))
  for p in config.CONFIGS.glob("runs/**/*.gin")
  if "python -m experiments.study" in p.read_text("utf-8")
)


@pytest.fixture(name="run")
def _run(tmp_path, capsys):
  """Returns f(flags) -> exit status, result, output and errors."""
  file = tmp_path / "coins.gin"
  file.write_text(GIN)
  fake_study.RAN.clear()
  fake_study.BROKEN.clear()

  def run(*more, workdir="work"):
    given = (f"--config={file}", f"--workdir={tmp_path / workdir}", *more)
    code = cli.call(study.main, ["study", *given])
    said = capsys.readouterr()
    last = said.out.splitlines()[-1:] or [""]
    result = json.loads(last[0]) if code == 0 else None
    return code, result, said.out, said.err

  run.folder = tmp_path / "work"
  return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_arm_is_asked_to_stop_as_a_training_is(run, number, monkeypatch):
  """Ctrl-C during a training of a study lost what `train` saves."""
  toss, asked = fake_study.Coins.run, []

  def interrupted(self, arm, *rest):
    if arm == "seed 1" and not asked:
      asked.append(signal.getsignal(number))
      os.kill(os.getpid(), number)
    return toss(self, arm, *rest)

  monkeypatch.setattr(fake_study.Coins, "run", interrupted)
  code, _, _, errors = run()
  assert code == preemption.Preempted.exit_status
  assert isinstance(asked[0], preemption.StopRequest)
  assert errors.startswith("preempted:")
  assert run()[0] == 0
  assert fake_study.RAN.count("seed 0") == 1


def test_arms_run_in_order_and_the_result_is_stored(run):
  code, result, out, _ = run()
  assert code == 0
  assert fake_study.RAN == ["prepared", "seed 0", "seed 1", "seed 2"]
  assert result == json.loads((run.folder / "result.json").read_text())
  states = [v["verdict"] for v in result["verdicts"]]
  assert states == ["holds", "does not hold", "undecided"]
  assert "\nDOES NOT HOLD: tails never do\n" in out
  assert "\nUNDECIDED: the coin is bent\n" in out
  assert (run.folder / "coins.txt").read_text() == "coins: 3"
  (table,) = result["tables"]
  assert table["header"] == ["arm", "heads"]
  *each, (name, (mean, half)) = table["rows"]
  assert name == "mean" and half > 0
  assert mean == pytest.approx(sum(x for _, x in each) / 3)
  row = json.loads((run.folder / "arms" / "seed_1.json").read_text())["row"]
  assert row["before"] == ["seed 0"]


def test_a_result_says_where_it_is_from(run):
  _, result, _, _ = run("--set=fake_study.Coins.tosses=4")
  assert re.fullmatch(
    r"python -m experiments.study --config=\S+/coins.gin --workdir=DIR"
    r" --set=fake_study.Coins.tosses=4",
    result["command"],
  )
  assert re.fullmatch(r"[0-9a-f]{40}\+?", result["commit"])
  assert result["seeds"] == 3 and " cores of " in result["machine"]
  assert set(result["versions"]) == set(results.LIBRARIES)
  assert set(result["arms"]) == {"seed 0", "seed 1", "seed 2"}
  assert "row_commits" not in result


def test_rows_of_another_commit_are_said(run, monkeypatch):
  with monkeypatch.context() as older:
    older.setattr(results, "commit", lambda: "0" * 40)
    run("--only=seed 0")
  _, result, _, _ = run()
  assert result["row_commits"] == sorted(["0" * 40, result["commit"]])


def test_what_is_there_is_not_run_again(run):
  fake_study.BROKEN["seed 1"] = KeyboardInterrupt()
  assert run()[0] == 130
  fake_study.BROKEN.clear()
  fake_study.RAN.clear()
  code, result, _, _ = run()
  assert code == 0 and fake_study.RAN == ["prepared", "seed 1", "seed 2"]
  fake_study.RAN.clear()
  assert run()[1] == result and not fake_study.RAN


LOCKS = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("serial", [False, True])
def test_processes_share_the_arms(run, monkeypatch, serial):
  """What another process runs is left to it, and what needs it waits."""
  run("--only=seed 1")
  row = run.folder / "arms" / "seed_1.json"
  text = row.read_text()
  row.unlink()
  fake_study.RAN.clear()
  if not serial:
    monkeypatch.setattr(fake_study.Coins, "needs", lambda self, arm: ())
  command = [sys.executable, "-c", LOCKS, str(row.with_suffix(".lock"))]
  with subprocess.Popen(
    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
  ) as other:
    assert other.stdout.readline() == b"locked\n"
    ran = []

    def sleep(seconds):
      ran.extend(fake_study.RAN)
      row.write_text(text)
      other.stdin.close()
      other.wait()

    monkeypatch.setattr(study.time, "sleep", sleep)
    code, result, out, _ = run()
  assert code == 0 and list(result["arms"]) == ["seed 0", "seed 1", "seed 2"]
  assert "Waits for arms that another process runs." in out
  own = ["prepared", "seed 0", "seed 2"]
  assert ran == (own[:2] if serial else own) and fake_study.RAN[2:] == own[2:]


def test_without_all_arms_there_are_no_verdicts(run):
  code, result, out, _ = run("--only=seed [02]")
  assert code == 0 and result["missing"] == ["seed 1"]
  assert result["arms"] == ["seed 0", "seed 2"] and "verdicts" not in result
  assert "missing: seed 1. Verdicts need all arms." in out
  assert not (run.folder / "result.json").exists()
  for text, wrong in (("(", "no regular expression"), ("none", "no arm")):
    code, _, _, err = run(f"--only={text}")
    assert code == 1 and f"--only={text}: " in err and wrong in err
  assert run("--only=1")[1]["verdicts"]  # all are there now


def test_a_row_of_other_settings_is_refused_by_name(run):
  run("--only=seed 0")
  fake_study.RAN.clear()
  code, _, _, err = run("--set=fake_study.Coins.tosses=11")
  assert code == 1 and not fake_study.RAN
  assert f"{run.folder}/arms/seed_0.json: was made from other settings" in err
  assert "Found ...seed 0: 10..., expected ...seed 0: 11..." in err
  # Seeds come and go: a row depends on its own settings alone.
  assert run("--set=fake_study.Coins.seeds=2")[1]["seeds"] == 2


@pytest.mark.parametrize(
  ("text", "wrong"),
  [
    ('{"arm": "seed 0", "heads": 1}', "an older command wrote it"),
    ("{", "is no JSON"),
    (
      '{"arm": "seed+0", "settings": "seed 0: 10", "row": {}}',
      "found the arm 'seed+0', expected 'seed 0'",
    ),
  ],
)
def test_other_files_are_refused_by_name(run, text, wrong):
  (run.folder / "arms").mkdir(parents=True)
  (run.folder / "arms" / "seed_0.json").write_text(text)
  code, _, _, err = run()
  assert code == 1 and wrong in err and "arms/seed_0.json: " in err


def test_a_folder_of_another_command_is_refused(run):
  run.folder.mkdir()
  note = run.folder / "config.gin"
  note.write_text("study.Study.steps = 3\n")
  code, _, _, err = run()
  assert code == 1 and f"{note}: found no study in it" in err
  assert note.read_text() == "study.Study.steps = 3\n"


def test_an_arm_that_states_why_it_failed_is_data(run):
  code, result, out, _ = run("--set=fake_study.Coins.stuck=True")
  assert code == 0 and result["failed"] == {"stuck": "the coin is stuck"}
  assert "stuck: failed: the coin is stuck" in out and result["verdicts"]
  fake_study.RAN.clear()
  assert run("--set=fake_study.Coins.stuck=True")[0] == 0
  assert not fake_study.RAN


def test_one_seed_decides_nothing(run):
  code, result, out, _ = run("--set=fake_study.Coins.seeds=1")
  assert code == 0
  assert {v["verdict"] for v in result["verdicts"]} == {"undecided"}
  assert "inf" not in out.lower() and "(one value)" in out
  assert result["tables"][0]["rows"][-1][1][1] is None


def test_two_arms_of_one_name():
  protocol.distinct(["a", "b"], "Table.rows")
  with pytest.raises(UserError, match="Table.rows: two are called 'a'"):
    protocol.distinct(["a", "b", "a"], "Table.rows")


# --- settings ---


def _power(n):
  return lambda x: x**n


def test_settings_are_those_that_count():
  """Also what a function closes over, which its name does not say."""
  coins = fake_study.Coins(tosses=3)
  same = protocol.describe(fake_study.Coins(tosses=3))
  assert protocol.describe(coins) == same and "0x" not in same
  assert "tosses=3" in same and "tosses" not in protocol.describe(
    coins, "tosses"
  )
  text = protocol.describe
  assert text(_power(2)) == text(_power(2)) != text(_power(3))
  assert text(functools.partial(max, 1)) != text(functools.partial(max, 2))
  assert text({"a": _power(2)}) != text({"a": _power(3)})
  assert text(object()) == text(object())
  around = []
  around.append(around)
  assert text(around) == "(...)"


@pytest.mark.parametrize("file", STUDIES)
def test_every_study_parses_and_its_text_rebuilds_it(file):
  if "champ" in file:  # its macro finds the package's file
    pytest.importorskip("champ_dataset", reason="the extra `reasoning`")
  first = config.read(file, root=protocol.Run)
  again = config.parse(first.text, root=protocol.Run)
  assert again.text == first.text
  one, other = first.experiment.study, again.experiment.study
  assert list(one.arms) == list(other.arms)
  assert len(set(one.arms)) == len(one.arms) > 0
  for arm in one.arms:
    settings = one.settings(arm)
    assert settings == other.settings(arm) and " at 0x" not in settings


def test_a_run_file_without_a_study_is_refused():
  alone = GIN.replace("protocol.Run.study = @fake_study.Coins()", "")
  with pytest.raises(UserError, match="protocol.Run.study: is not bound, exp"):
    config.parse(alone, root=protocol.Run)
  other = config.find("runs/quickstart.gin")
  with pytest.raises(UserError, match="binds nothing of protocol.Store, which"):
    config.read(str(other), root=protocol.Store)


# --- pages ---

PAGE = """# Coins

<!-- results: runs/coins/coins.json 0 -->
| old | table |
<!-- end -->

Below.
"""


@pytest.fixture(name="checkout")
def _checkout(tmp_path, monkeypatch):
  """A checkout with a run file and a page."""
  runs = tmp_path / "configs" / "runs" / "coins"
  runs.mkdir(parents=True)
  (runs / "coins.gin").write_text(GIN)
  (tmp_path / "research").mkdir()
  (tmp_path / "research" / "COINS.md").write_text(PAGE)
  monkeypatch.setattr(results, "ROOT", tmp_path)
  monkeypatch.setattr(results, "CONFIGS", tmp_path / "configs")
  return tmp_path


def test_a_result_is_rendered_into_pages(checkout, capsys):
  given = [
    f"--config={checkout}/configs/runs/coins/coins.gin",
    f"--workdir={checkout}/work",
    "--render",
  ]
  assert cli.call(study.main, ["study", *given]) == 0
  stored = checkout / "configs" / "runs" / "coins" / "results" / "coins.json"
  result = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert json.loads(stored.read_text()) == result
  page = (checkout / "research" / "COINS.md").read_text()
  assert "| old | table |" not in page and page.endswith("\n\nBelow.\n")
  (mean, half) = result["tables"][0]["rows"][-1][1]
  assert f"| mean | {mean:.4g} ± {half:.4g} |" in page
  assert not results.render_pages(write=False)
  # A table is a line a row.
  assert '   ["mean", [' in stored.read_text()
  with pytest.raises(UserError, match="found 1 tables, expected number 1"):
    results.rewrite(PAGE.replace("json 0", "json 1"))
  with pytest.raises(UserError, match="no such result"):
    results.rewrite(PAGE.replace("coins.json", "dice.json"))
  claims = results.rewrite(PAGE.replace("json 0", "json verdicts"))
  assert "| claim | found | verdict |" in claims
  for one in result["verdicts"]:
    assert f"| {one['claim']} | {one['found']} | {one['verdict']} |" in claims


def test_a_page_with_another_number_is_found(checkout):
  page = checkout / "research" / "COINS.md"
  table = {"header": ["arm", "heads"], "rows": [["fair", 0.5]]}
  stored = checkout / "configs" / "runs" / "coins" / "results" / "coins.json"
  stored.parent.mkdir()
  stored.write_text(
    results.json_text(
      {
        "command": "make coins",
        "commit": "0123456789+",
        "machine": "a table",
        "tables": [table],
      }
    )
  )
  with pytest.raises(UserError, match="found no verdicts"):
    results.rewrite(PAGE.replace("json 0", "json verdicts"))
  assert results.render_pages() == [page]
  text = page.read_text()
  assert "| fair | 0.5 |\n\n`make coins`; recorded by `0123456+`" in text
  assert not results.render_pages(write=False)
  page.write_text(text.replace("0.5", "0.6"))
  assert results.render_pages(write=False) == [page]
  assert "0.6" in page.read_text()


def test_results_are_stored_beside_run_files_alone(run):
  code, _, _, err = run("--render")
  assert code == 1 and "expected a file in configs/runs/" in err
  assert not fake_study.RAN


@pytest.mark.parametrize(
  ("value", "cell"),
  [
    (None, ""),
    ("r = 4", "r = 4"),
    (1234567, "1,234,567"),
    (2.0, "2"),
    (0.0001234, "0.0001234"),
    (12345.678, "12,346"),
    (108.83, "108.83"),
    (2.071234, "2.071"),
    ([0.5, 0.25], "0.5 ± 0.25"),
    ([0.5, None], "0.5"),
    (0.0, "0"),
  ],
)
def test_cells_are_for_people(value, cell):
  assert results.markdown({"header": ["a"], "rows": [[value]]}).endswith(
    f"| {cell} |"
  )


@pytest.mark.parametrize(
  ("column", "cells"),
  [
    ([4.5, 4.516, 4.312], ["4.500", "4.516", "4.312"]),
    ([4.5, 4.25, 4.5], ["4.5", "4.25", "4.5"]),
    ([2371.0, 71.3, 71.25, 8.43], ["2,371.0", "71.30", "71.25", "8.43"]),
    ([[0.27, 0.01], [0.084, 0.005]], ["0.270 ± 0.010", "0.084 ± 0.005"]),
    ([[99.6, 2.0], [14.7, 42.0]], ["99.6 ± 2", "14.7 ± 42"]),
    ([7, 0.25, None, "edge"], ["7", "0.25", "", "edge"]),
  ],
)
def test_a_column_has_decimals_in_common(column, cells):
  table = {"header": ["a"], "rows": [[x] for x in column]}
  _, _, *lines = results.markdown(table).split("\n")
  assert lines == [f"| {cell} |" for cell in cells]
