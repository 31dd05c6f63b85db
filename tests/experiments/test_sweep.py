"""The sweep command: with scripts in the place of runs, and once in earnest."""

import csv
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from experiments import sweep, sweeps
from experiments.core import cli, config
from experiments.sweeps import (
  launch,
  live_table,
  sweep_results,
  sweep_units,
  work,
)
from research.typing import UserError
from tests.experiments import test_study

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "golden" / "models" / "gguf_f32" / "model.gguf"

# What a run leaves, in no time. Rank 4 fails until a file `mended` is there;
# rank 2 is preempted once; rank 1 with seed 1 diverges if `diverges` is there.
RUN = r"""
import json, pathlib, re, sys
given = dict(x[2:].split("=", 1) for x in sys.argv[1:4])
config, workdir, out = map(pathlib.Path, given.values())
text = config.read_text()
names = "RANK", "SEED", "STEPS", "LEARNING_RATE"
rank, seed, steps, rate = (
  float(re.search(rf"^{name} = (\S+)", text, re.M)[1]) for name in names
)
workdir.mkdir(parents=True, exist_ok=True)
(workdir / "flags").write_text(" ".join(sys.argv[4:]))
lives = workdir / "lives"
before = lives.read_text() if lives.exists() else ""
lives.write_text(before + "x")
if rank == 2 and not before:
  sys.exit(42)
if rank == 4 and not (workdir.parents[2] / "mended").exists():
  print("lots of talk\nerror: no luck today")
  sys.exit(1)
result = {"steps": steps, "perplexity_after": 10 + rank + seed / 10}
if rank == 1 and seed == 1 and (workdir.parents[2] / "diverges").exists():
  result["perplexity_after"] = None
result |= {"seconds": 1.5, "seconds_by_part": {"step": 1.0}, "best": None}
out.write_text(json.dumps(result))
"""

SWEEP = """
from __gin__ import dynamic_registration
from experiments import sweeps
sweeps.Sweep.config = 'runs/quickstart.gin'
sweeps.Sweep.over = {{'RANK': {ranks}}}
sweeps.Sweep.seeds = [0, 1]
sweeps.Sweep.fixed = {{'STEPS': {steps}, 'WARMUP': 1}}
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
  """Calls the command in this process, on ranks: `(status, result, out)`."""
  script = tmp_path / "run.py"
  script.write_text(RUN)

  def fake(self):
    return [sys.executable, "-S", str(script), *self.arguments[2:]]

  monkeypatch.setattr(work.Work, "command", property(fake))

  def call(*arguments, ranks=(1, 8), steps=4, more=""):
    file = tmp_path / "mine.gin"
    file.write_text(SWEEP.format(ranks=list(ranks), steps=steps) + more)
    where = [f"--sweep={file}", f"--workdir={tmp_path / 'out'}"]
    status = cli.call(sweep.main, ["sweep", *where, *arguments])
    out = capsys.readouterr()
    lines = out.out.splitlines()
    result = json.loads(lines[-1]) if lines and lines[-1][:1] == "{" else None
    return status, result, out

  call.out = tmp_path / "out"
  return call


def lives(command, name):
  return len((command.out / "units" / name / "lives").read_text())


def test_a_sweep_leaves_a_table_and_a_picture(command):
  status, result, out = command()
  assert status == 0, out.err
  assert (result["units"], result["done"]) == (4, 4)
  assert result["failed"] == result["missing"] == []
  assert result["best"] == {
    "bindings": {"RANK": 1},
    "runs": 2,
    "mean": pytest.approx(11.05),
    "deviation": pytest.approx(0.1 / 2**0.5),
  }
  with (command.out / "results.csv").open(newline="") as file:
    table = list(csv.DictReader(file))
  found = [(r["RANK"], r["SEED"], r["perplexity_after"]) for r in table]
  assert found == [
    ("1", "0", "11.0"),
    ("1", "1", "11.1"),
    ("8", "0", "18.0"),
    ("8", "1", "18.1"),
  ]
  assert table[0]["seconds_by_part/step"] == "1.0"
  assert (command.out / "results.png").read_bytes()[:4] == b"\x89PNG"
  assert json.loads((command.out / "result.json").read_text()) == result
  assert "[4/4] RANK=8_SEED=1: perplexity_after 18.1" in out.out


def test_what_is_done_is_not_done_again(command):
  command()
  status, result, out = command(ranks=(1, 8, 16))
  assert (status, result["done"]) == (0, 6)
  assert "6 units, 2 of them to run" in out.out
  assert result["best"]["bindings"] == {"RANK": 1}
  # Nor for another question to the same results.
  higher = "sweeps.Sweep.better = 'higher'"
  _, result, _ = command(ranks=(1, 8, 16), more=higher)
  assert result["best"]["bindings"] == {"RANK": 16}
  assert lives(command, "RANK=1_SEED=0") == 1
  # More steps are another result, of the same units.
  status, result, out = command(steps=8)
  assert "4 units, 4 of them to run" in out.out
  assert lives(command, "RANK=1_SEED=0") == 2


def test_equal_settings_have_no_best(command):
  status, result, out = command(more="sweeps.Sweep.metric = 'steps'")
  assert (status, result["best"]) == (0, None)
  assert "All 2 settings have the same steps, " in out.out


def test_a_failure_is_told_at_the_end_and_can_be_mended(command):
  status, result, out = command(ranks=(4, 1))
  assert status == 1
  assert result["done"] == 2
  assert result["failed"] == ["RANK=4_SEED=0", "RANK=4_SEED=1"]
  assert "2 of 4 units failed" in out.err and "no luck today" in out.err
  assert len(out.err.strip().splitlines()) <= 3
  assert "failed with 1: no luck today" in out.out
  # Each was tried twice, and its log ends the report.
  assert lives(command, "RANK=4_SEED=0") == 2
  assert "RANK=4_SEED=0.log:\n  lots of talk\n  error: no luck" in out.out
  (command.out.parent / "mended").touch()
  status, result, out = command(ranks=(4, 1))
  assert (status, result["done"], result["failed"]) == (0, 4, [])
  assert lives(command, "RANK=1_SEED=0") == 1


def test_a_mean_is_not_that_of_the_seeds_that_did_not_diverge(command):
  """Rank 1 would be the best by its other seed."""
  (command.out.parent / "diverges").touch()
  status, result, out = command()
  assert (status, result["done"]) == (0, 4)
  assert result["diverged"] == ["RANK=1_SEED=1"] and result["failed"] == []
  assert result["best"]["bindings"] == {"RANK": 8}
  assert "1 of 4 units ran and have no finite perplexity_after" in out.out
  lines = [line.split() for line in out.out.splitlines()]
  assert ["1", "1", "-", "-", "1"] in lines


def test_a_mean_is_not_that_of_the_seeds_that_did_not_fail(command, tmp_path):
  script = tmp_path / "run.py"
  script.write_text(RUN.replace("if rank == 4", "if rank == 1 and seed == 1"))
  status, result, _ = command()
  assert (status, result["failed"]) == (1, ["RANK=1_SEED=1"])
  assert result["best"]["bindings"] == {"RANK": 8}


def test_a_sweep_that_diverged_as_a_whole_says_so(command):
  (command.out.parent / "diverges").touch()
  status, _, out = command(
    more="sweeps.Sweep.over = {'RANK': [1]}\nsweeps.Sweep.seeds = [1]"
  )
  assert status == 1
  assert "'perplexity_after' is null in all of 1 results" in out.err


def test_a_picture_of_nothing_is_not_drawn(command):
  """All units on the axis failed, others are done."""
  more = """
sweeps.Sweep.over = {'chain': [{'RANK': [4]}, {'LEARNING_RATE': [1e-4]}]}
sweeps.Sweep.axis = 'RANK'
"""
  status, result, out = command(more=more)
  assert (status, result["done"]) == (1, 2)
  assert "2 of 4 units failed" in out.err and "Traceback" not in out.err
  assert not (command.out / "results.png").exists()


def test_a_preempted_unit_goes_on(command):
  status, result, _ = command(ranks=(2, 1))
  assert (status, result["done"]) == (0, 4)
  assert lives(command, "RANK=2_SEED=0") == 2


def test_what_remains_after_a_preemption_is_said(command, monkeypatch):
  monkeypatch.setattr(launch, "PREEMPTIONS", 0)
  status, result, out = command(ranks=(2, 1))
  assert status == work.PREEMPTED
  assert result["missing"] == ["RANK=2_SEED=0", "RANK=2_SEED=1"]
  assert "2 of 4 units are not done" in out.err


def test_fewer_steps_are_not_the_result_of_more(command):
  """Which train returns of a run that has finished."""
  command(steps=8)
  place = command.out / "units" / "RANK=8_SEED=0"
  (place / "checkpoints" / "8").mkdir(parents=True)
  text = (command.out / "units" / "RANK=8_SEED=0.gin").read_text()
  status, result, out = command(steps=4)
  assert (status, result) == (1, None)
  assert f"{place}: is at step 8, expected at most 4" in out.err
  assert (command.out / "units" / "RANK=8_SEED=0.gin").read_text() == text
  assert command(steps=9)[0] == 0


def test_a_trial_has_bindings_of_its_own(command):
  # The type checks are the units' as well.
  command("--set=STEPS=2", "--parallel=2", "--notypecheck")
  made = (command.out / "units" / "RANK=8_SEED=0" / "flags").read_text()
  assert made == "--notypecheck"
  text = (command.out / "units" / "RANK=8_SEED=0.gin").read_text()
  assert "\nSTEPS = 2\n" in text and "\nRANK = 8\n" in text
  assert config.parse(text).text == text


@pytest.mark.parametrize(
  ("arguments", "options", "message"),
  [
    (["--set=RANK=3"], {}, "the sweep varies it already"),
    (["--set=RANKS=3"], {}, "did you mean RANK"),
    ([], {"more": "sweeps.Sweep.seed = 'SEEED'"}, "nothing in this run uses"),
    ([], {"ranks": (1, 2.5)}, "unit RANK=2.5_SEED=0: .*rank: found 2.5"),
    ([], {"ranks": (8, 8)}, "are the same run"),
    ([], {"more": "sweeps.Sweep.axes = 'RANK'"}, "parameter named 'axes'"),
    ([], {"more": "sweeps.Sweep.better = 'more'"}, "better: found 'more'"),
    (["--sweep=nowhere.gin"], {}, "--sweep=nowhere.gin: no such file"),
    (["--status"], {}, "found no sweep there"),
    (["--status", "--cancel"], {}, "--status: has no effect with --cancel"),
    (["--cancel", "--launcher=jobset"], {}, "'kubectl delete -f'"),
    (["--workdir=gs://a/b"], {}, "--workdir=gs://a/b: .* a local one"),
  ],
)
def test_mistakes_are_found_before_anything_runs(
  command, arguments, options, message
):
  status, result, out = command(*arguments, **options)
  assert (status, result) == (1, None)
  assert re.search(message, " ".join(out.err.split()))
  assert len(out.err.strip().splitlines()) <= 3
  assert not command.out.exists()


def test_a_metric_that_is_not_there_names_those_that_are(command):
  status, _, out = command(more="sweeps.Sweep.metric = 'perplexity'")
  assert status == 1
  assert "no result has 'perplexity'" in out.err
  assert "perplexity_after" in out.err


def test_planning_leaves_the_accelerator_to_the_units(tmp_path):
  """A backend that does not exist is not missed."""
  code = (
    "import pathlib\n"
    "from experiments.sweeps import sweep_units\n"
    "from experiments import sweeps\n"
    "made = sweeps.Sweep(config='runs/quickstart.gin', over={'RANK': [1, 2]})\n"
    "print(len(sweep_units.plan(made, pathlib.Path('x'))))\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "nonesuch"},
  )
  assert done.stdout == "2\n", done.stderr


def test_units_that_cannot_be_written(tmp_path):
  (tmp_path / "units").write_text("in the way")
  made = sweeps.Sweep(config="runs/quickstart.gin", over={"RANK": [1, 2]})
  with pytest.raises(UserError, match="cannot be written"):
    sweep_units.write(sweep_units.plan(made, tmp_path))


def test_a_result_is_of_its_own_configuration(tmp_path):
  made = sweeps.Sweep(config="runs/quickstart.gin", over={"RANK": [1, 2]})
  unit = sweep_units.plan(made, tmp_path)[0]
  assert unit.result() is None
  sweep_units.write([unit])
  unit.work.result.write_text('{"steps": 72, "by_part": {"step": 1.5}}')
  assert unit.result() == {"steps": 72, "by_part/step": 1.5}
  longer = sweep_units.plan(made, tmp_path, ["STEPS = 90"])[0]
  assert longer.result() is None
  # A result of other settings is gone before the unit runs.
  sweep_units.write([longer])
  assert longer.result() is None and unit.result() is None
  unit.work.result.write_text("{torn")
  assert longer.result() is None


@pytest.mark.parametrize(
  "verdicts",
  [["holds", "undecided", "holds"], ["does not hold"], ["undecided"] * 2, []],
)
def test_verdicts_are_counted_none_as_zero(verdicts, tmp_path):
  """A mean over seeds, and the best unit, need those where none holds."""
  made = sweeps.Sweep(config="runs/quickstart.gin", over={"SEED": [0]})
  [unit] = sweep_units.plan(made, tmp_path)
  sweep_units.write([unit])
  found = {"verdicts": [{"claim": "c", "verdict": x} for x in verdicts]}
  unit.work.result.write_text(json.dumps(found))
  for state in ("holds", "does not hold", "undecided"):
    assert unit.result()[f"verdicts/{state}"] == verdicts.count(state)
    [group] = sweep_results.groups([unit], f"verdicts/{state}", made.seed)
    assert group.values == [verdicts.count(state)]


STUDY = """
from __gin__ import dynamic_registration
from experiments import sweeps
sweeps.Sweep.command = 'study'
sweeps.Sweep.config = '{config}'
sweeps.Sweep.over = {{'fake_study.Coins.tosses': [4, 9]}}
sweeps.Sweep.metric = 'verdicts/holds'
sweeps.Sweep.better = 'higher'
sweeps.Sweep.axis = 'fake_study.Coins.tosses'
"""


@pytest.fixture
def swept(tmp_path, monkeypatch, capsys):
  """Returns f(sweep file's text) -> its result; units run in this process.

  By the command lines that they have; each has to succeed.
  """

  def here(units, events, **_):
    statuses = {}
    for unit in units:
      module, *given = unit.arguments[1:]
      main = importlib.import_module(module).main
      statuses[unit.name] = cli.call(main, [module, *given])
      events.ended(unit, statuses[unit.name], 1.0)
    return statuses

  monkeypatch.setattr(launch, "local", here)

  def call(text):
    file = tmp_path / "mine.gin"
    file.write_text(text)
    given = [f"--sweep={file}", f"--workdir={tmp_path / 'out'}"]
    status = cli.call(sweep.main, ["sweep", *given])
    out = capsys.readouterr()
    assert status == 0, out.err
    return json.loads(out.out.splitlines()[-1])

  call.units = tmp_path / "out" / "units"
  return call


def test_a_study_is_swept(tmp_path, swept):
  (tmp_path / "coins.gin").write_text(test_study.GIN)
  result = swept(STUDY.format(config=tmp_path / "coins.gin"))
  assert result["done"] == 2 and result["metric"] == "verdicts/holds"
  holds = []
  for tosses in (4, 9):
    one = swept.units / f"fake_study.Coins.tosses={tosses}"
    stored = json.loads(one.with_name(f"{one.name}.json").read_text())
    assert stored == json.loads((one / "result.json").read_text())
    holds.append(sum(v["verdict"] == "holds" for v in stored["verdicts"]))
  assert result["best"]["mean"] == max(holds) > 0


SEARCH = f"""
from __gin__ import dynamic_registration
from experiments import sweeps
sweeps.Sweep.command = 'search'
sweeps.Sweep.config = '{ROOT}/tests/experiments/searching/tiny.gin'
sweeps.Sweep.over = {{'COPIES': [1, 2]}}
sweeps.Sweep.fixed = {{'PROBLEMS': (0, 2)}}
sweeps.Sweep.metric = 'tokens_per_problem'
"""


def test_a_search_is_swept(swept):
  """Two samples of a problem have more tokens than one."""
  result = swept(SEARCH)
  assert result["done"] == 2 and result["best"]["bindings"] == {"COPIES": 1}
  for copies in (1, 2):
    one = swept.units / f"COPIES={copies}"
    found = json.loads(one.with_name(f"{one.name}.json").read_text())
    assert (found["n"], found["problems"]) == (copies, 2)
    lines = (one / "pool.jsonl").read_text().splitlines()
    assert [len(json.loads(x)["samples"]) for x in lines] == [copies] * 2


EVALUATE = f"""
from __gin__ import dynamic_registration
from experiments import sweeps
sweeps.Sweep.command = 'evaluate'
sweeps.Sweep.config = 'runs/quickstart.gin'
sweeps.Sweep.over = {{'LENGTH': [16]}}
sweeps.Sweep.fixed = {{
    'BATCH': 2, 'EVAL_BATCHES': 1, 'experiment.Pretrained.name': '{TINY}',
}}
sweeps.Sweep.metric = 'heldout/perplexity'
"""


def test_an_evaluation_is_swept(swept):
  """Of the model before training: it leaves a result, and no run."""
  result = swept(EVALUATE)
  assert result["done"] == 1 and result["best"]["mean"] > 1
  found = json.loads((swept.units / "LENGTH=16.json").read_text())
  assert found["heldout/perplexity"] == result["best"]["mean"]
  assert not (swept.units / "LENGTH=16").exists()


@pytest.mark.parametrize("command", sweep_units.ROOTS)
def test_every_command_takes_its_units_flags(command, tmp_path):
  module = f"experiments.{command}"
  if importlib.util.find_spec(module) is None:
    pytest.skip(f"{module} is not there yet")
  assert isinstance(sweep_units.root(command), type)
  unit = work.Work(
    name="a",
    config=tmp_path / "a=0.1.gin",
    workdir=tmp_path / "a",
    log=tmp_path / "a.log",
    program=command,
  )
  names = {x[2:].split("=")[0] for x in unit.arguments[2:]}
  assert names <= set(importlib.import_module(module).FLAGS)
  assert unit.result.name == "a=0.1.json"
  # A run that is there is not what an evaluation of a unit means.
  assert ("workdir" in names) == (command != "evaluate")


def test_in_a_terminal_running_units_have_a_table(tmp_path):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  now = [0.0]
  screen = Terminal()
  table = live_table.LiveTable(screen, clock=lambda: now[0])
  table.draw(lambda: [{"running": "a" * 200}, {"running": "b"}])
  width = shutil.get_terminal_size().columns
  drawn = screen.getvalue()
  assert drawn.count("\n") == 4
  assert max(map(len, drawn.splitlines())) < width
  table.draw(lambda: [{"running": "c"}])  # too early
  assert screen.getvalue() == drawn
  now[0] = live_table.INTERVAL
  table.draw(lambda: [{"running": "c"}])
  assert "\x1b[4F\x1b[J" in screen.getvalue()
  table.clear()
  assert screen.getvalue().endswith("c\n\x1b[3F\x1b[J")
  silent = io.StringIO()
  live_table.LiveTable(silent).draw(lambda: [{"running": "a"}])
  assert silent.getvalue() == ""


def test_how_far_a_unit_is(tmp_path):
  unit = work.Work(
    name="a",
    config=tmp_path / "a.gin",
    workdir=tmp_path,
    log=tmp_path / "a.log",
  )
  assert sweep_results.progress_of(unit) == ""
  unit.log.write_text("loading\n 1%|\r 2%|\n")
  assert sweep_results.progress_of(unit) == " 2%|"
  metrics = tmp_path / "metrics.jsonl"
  metrics.write_text('{"step": 3, "train/loss": 2.5}\n{"step": 4, "tr')
  assert sweep_results.progress_of(unit) == "step 3, loss 2.5"


EARNEST = f"""
from __gin__ import dynamic_registration
from experiments import sweeps
sweeps.Sweep.config = 'runs/quickstart.gin'
sweeps.Sweep.over = {{'adapt.Adapt.targets': ['all-linear', 'nowhere']}}
sweeps.Sweep.fixed = {{
    'STEPS': 2, 'BATCH': 2, 'LENGTH': 16, 'EVAL_BATCHES': 1, 'WARMUP': 1,
    'experiment.Experiment.prompt': None,
    'experiment.Pretrained.name': '{TINY}',
}}
"""


@pytest.mark.slow
def test_in_earnest(tmp_path):
  """Real runs of a tiny model, one of which fails."""
  file = tmp_path / "earnest.gin"
  file.write_text(EARNEST)
  done = subprocess.run(
    [
      *(sys.executable, "-m", "experiments.sweep", "--nohuge_pages"),
      "--notypecheck",  # that goes on to three processes' imports
      f"--sweep={file}",
      f"--workdir={tmp_path / 'out'}",
    ],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.returncode == 1, done.stderr
  result = json.loads(done.stdout.splitlines()[-1])
  assert result["done"] == 1 and len(result["failed"]) == 1
  assert result["best"]["bindings"] == {"adapt.Adapt.targets": "all-linear"}
  assert "1 of 2 units failed" in done.stderr
  assert "nowhere" in done.stderr and "Traceback" not in done.stderr
