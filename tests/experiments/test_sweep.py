"""The sweep command: with scripts in the place of runs, and once in earnest."""

import csv
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from experiments import sweep, sweeps
from experiments.core import cli, config
from experiments.sweeps import launch, sweep_units
from research.typing import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "golden" / "models" / "gguf_f32" / "model.gguf"

# What a run leaves, in no time. Rank 4 fails until a file `mended` is there;
# rank 2 is preempted once.
RUN = r"""
import json, pathlib, re, sys
config, workdir = (pathlib.Path(a.split("=", 1)[1]) for a in sys.argv[1:3])
text = config.read_text()
names = "RANK", "SEED", "STEPS", "LEARNING_RATE"
rank, seed, steps, rate = (
  float(re.search(rf"^{name} = (\S+)", text, re.M)[1]) for name in names
)
workdir.mkdir(parents=True, exist_ok=True)
(workdir / "config.gin").write_text(text)
(workdir / "flags").write_text(" ".join(sys.argv[3:]))
lives = workdir / "lives"
before = lives.read_text() if lives.exists() else ""
lives.write_text(before + "x")
if rank == 2 and not before:
  sys.exit(42)
if rank == 4 and not (workdir.parents[2] / "mended").exists():
  print("lots of talk\nerror: no luck today")
  sys.exit(1)
result = {"steps": int(steps), "perplexity_after": 10 + rank + seed / 10}
result |= {"seconds": 1.5, "seconds_by_part": {"step": 1.0}, "best": None}
(workdir / "result.json").write_text(json.dumps(result))
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
    return [
      *(sys.executable, "-S", str(script)),
      f"--config={self.config}",
      f"--workdir={self.workdir}",
      *self.options,
    ]

  monkeypatch.setattr(launch.Work, "command", property(fake))

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


def test_a_failure_is_told_at_the_end_and_can_be_mended(command):
  status, result, out = command(ranks=(4, 1))
  assert status == 1
  assert result["done"] == 2
  assert result["failed"] == ["RANK=4_SEED=0", "RANK=4_SEED=1"]
  assert "2 of 4 units failed" in out.err and "no luck today" in out.err
  assert len(out.err.strip().splitlines()) <= 3
  assert "failed with 1: no luck today" in out.out
  (command.out.parent / "mended").touch()
  status, result, out = command(ranks=(4, 1))
  assert (status, result["done"], result["failed"]) == (0, 4, [])
  assert lives(command, "RANK=1_SEED=0") == 1


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
  monkeypatch.setattr(launch, "RETRIES", 0)
  status, result, out = command(ranks=(2, 1))
  assert status == launch.PREEMPTED
  assert result["missing"] == ["RANK=2_SEED=0", "RANK=2_SEED=1"]
  assert "2 of 4 units are not done" in out.err


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
    (["--workdir=gs://a/b"], {}, "--workdir=gs://a/b: .* a local path"),
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
  folder = unit.work.workdir
  folder.mkdir(parents=True)

  def leave(text, steps):
    (folder / "config.gin").write_text(text)
    (folder / "result.json").write_text(json.dumps({"steps": steps}))
    return unit.result()

  assert unit.result() is None
  assert leave(unit.text, unit.steps) == {"steps": 72}
  assert leave(unit.text.replace("RANK = 1", "RANK = 3"), 72) is None
  # Being lengthened, and not yet at its end: the result is the shorter run's.
  assert leave(unit.text, 24) is None
  (folder / "result.json").write_text("{torn")
  assert unit.result() is None


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
