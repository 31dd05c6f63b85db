"""Slurm's array script: its text, what bash makes of it, and the queue.

Slurm itself runs it in `make test-slurm`; here stand-ins of its commands do.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments import sweep
from experiments.core import cli
from experiments.sweeps import slurm
from research.typing import UserError
from tests.golden import make_launchers
from tests.golden.make_launchers import units


def test_the_text(monkeypatch):
  """What a user reads, and may submit by hand."""
  monkeypatch.setattr(sys, "executable", "python")
  text = make_launchers.texts()["array.sh"]
  assert text == (make_launchers.FOLDER / "array.sh").read_text()


@pytest.mark.parametrize(
  ("option", "message"),
  [
    ("nodes=2", "found no option"),
    ("--array=0-5", "sets --array"),
    ("--no-requeue", "sets --array and --requeue itself"),
    ("--time=1\nrm -r x", "found no option"),
  ],
)
def test_options_that_would_break_it(option, message, tmp_path):
  with pytest.raises(UserError, match=message):
    slurm.script(units(tmp_path), name="a", folder=tmp_path, options=[option])


# They log their arguments; srun also says what was exported, waits for a file
# `go` if there is a file `wait`, and ends as the file `statuses` says.
COMMANDS = {
  "srun": """
  echo "srun $HEPTAD_GRACE_SECONDS $*" >> "$TEST_FOLDER/calls"
  echo "from the unit"
  touch "$TEST_FOLDER/started"
  [ -e "$TEST_FOLDER/wait" ] && until [ -e "$TEST_FOLDER/go" ]; do
    sleep 0.01
  done
  read -r status < "$TEST_FOLDER/statuses"
  sed -i 1d "$TEST_FOLDER/statuses"
  exit "$status"
  """,
  "scontrol": """
  if [ "$1" = show ]; then
    echo "Configuration data as of 2026"
    echo "KillOnBadExit           = 0"
    echo "KillWait                = 45 sec"
  else
    echo "scontrol $*" >> "$TEST_FOLDER/calls"
  fi
  """,
  "sbatch": """
  echo "sbatch $*" >> "$TEST_FOLDER/calls"
  echo "12;cluster"
  """,
  "squeue": 'cat "$TEST_FOLDER/queue"',
  "scancel": 'echo "scancel $*" >> "$TEST_FOLDER/calls"',
}


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
  """Puts the commands into PATH; returns the folder that they use."""
  folder = tmp_path / "stand-ins"
  folder.mkdir()
  for name, text in COMMANDS.items():
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)
  monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
  monkeypatch.setenv("TEST_FOLDER", str(folder))
  return folder


def start(stand_ins, tmp_path, statuses, index=1):
  (stand_ins / "statuses").write_text("".join(f"{x}\n" for x in statuses))
  places = tmp_path / "my units"
  places.mkdir(exist_ok=True)
  text = slurm.script(units(places), name="a", folder=tmp_path)
  return subprocess.Popen(
    ["bash", "-c", text],
    env=os.environ | {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_JOB_ID": "14"},
  )


def calls(stand_ins):
  return (stand_ins / "calls").read_text().splitlines()


@pytest.mark.parametrize(
  ("statuses", "end", "requeued"),
  [
    ([0], 0, False),
    ([1, 0], 0, False),
    ([1, 137], 137, False),
    ([42], 42, True),
    ([1, 42], 42, True),
    ([143], 143, True),
  ],
)
def test_how_a_unit_ends(stand_ins, tmp_path, statuses, end, requeued):
  assert start(stand_ins, tmp_path, statuses).wait(timeout=30) == end
  said = calls(stand_ins)
  runs = [line for line in said if line.startswith("srun 45 ")]
  assert len(runs) == len(statuses)
  # Slurm itself decides whether the job may be queued again.
  last = ["scontrol requeue incomplete 14"] if requeued else []
  assert said == runs + last
  place = tmp_path / "my units"
  unit = units(place)[1]
  expected = [
    "--kill-on-bad-exit=0",
    "--wait=300",
    sys.executable,
    *unit.arguments,
  ]
  assert set(runs) == {f"srun 45 {' '.join(expected)}"}
  assert unit.log.read_text() == "from the unit\n" * len(runs)


def test_the_script_waits_for_a_run_that_saves(stand_ins, tmp_path):
  (stand_ins / "wait").touch()
  process = start(stand_ins, tmp_path, [42])
  while not (stand_ins / "started").exists():
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  time.sleep(0.2)
  assert process.poll() is None
  (stand_ins / "go").touch()
  assert process.wait(timeout=30) == 42
  assert calls(stand_ins)[-1] == "scontrol requeue incomplete 14"


def test_the_queue(stand_ins, tmp_path):
  """From submission to the end, with units of other sweeps in between."""
  places = tmp_path / "units"
  places.mkdir()
  assert slurm.queued(tmp_path) == {}
  assert slurm.submit(units(places), tmp_path, "a", ["--nodes=2"]) == "12"
  assert calls(stand_ins) == [f"sbatch --parsable {tmp_path}/slurm/sweep.sh"]
  text = (tmp_path / "slurm" / "sweep.sh").read_text()
  assert "\n#SBATCH --nodes=2\n" in text

  queue = stand_ins / "queue"
  queue.write_text(
    "12|0|RUNNING|n[1-2]\n12|1|PENDING|\n9|0|RUNNING|n3\n8|N/A|X|\n"
  )
  jobs = slurm.queued(tmp_path)
  assert jobs == {
    "RANK=1": slurm.Job("12", "RUNNING", "n[1-2]"),
    "RANK=8": slurm.Job("12", "PENDING", ""),
  }
  assert slurm.ended(tmp_path, jobs) == set()
  (row, _) = slurm.table(jobs, {"RANK=1": "step 3", "RANK=8": ""})
  assert row == {
    "unit": "RANK=1",
    "state": "RUNNING",
    "on": "n[1-2]",
    "at": "step 3",
  }
  queue.write_text("12|1|PENDING|\n")
  jobs = slurm.queued(tmp_path)
  assert slurm.ended(tmp_path, jobs) == {"RANK=1"}
  # What is cancelled has not failed; what is not queued is not cancelled.
  assert slurm.cancel(tmp_path) == ["RANK=8"]
  assert calls(stand_ins)[-1] == "scancel 12"
  queue.write_text("")
  assert slurm.ended(tmp_path, slurm.queued(tmp_path)) == {"RANK=1"}
  assert slurm.cancel(tmp_path) == []


def test_errors_of_slurm_are_the_users(stand_ins, tmp_path):
  (stand_ins / "sbatch").write_text(
    "#!/bin/bash\necho 'no such partition' >&2\nexit 1"
  )
  with pytest.raises(UserError, match="sbatch: no such partition"):
    slurm.submit(units(tmp_path), tmp_path, "a")
  (tmp_path / "slurm" / slurm.JOBS).write_text(json.dumps([1]) + "\n")
  with pytest.raises(UserError, match="is no list of Slurm's jobs"):
    slurm.queued(tmp_path)


def test_without_slurm_it_says_so(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", "")
  with pytest.raises(UserError, match="found no sbatch here"):
    slurm.submit(units(tmp_path), tmp_path, "a")


SWEEP = """
from __gin__ import dynamic_registration
from experiments import sweeps
sweeps.Sweep.config = 'runs/quickstart.gin'
sweeps.Sweep.over = {'RANK': [1, 8]}
"""


def test_the_command(stand_ins, tmp_path, capsys):
  """Submits, shows, refuses what is queued, says what failed, cancels."""
  (tmp_path / "mine.gin").write_text(SWEEP)
  out, queue = tmp_path / "out", stand_ins / "queue"

  def call(*flags):
    given = f"--sweep={tmp_path / 'mine.gin'}", f"--workdir={out}", *flags
    status = cli.call(sweep.main, ["sweep", *given])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    return status, json.loads(lines[-1]) if not status else None, said

  status, result, _ = call("--launcher=slurm", "--sbatch=--nodes=2")
  assert (status, result["submitted"], result["array"]) == (0, 2, "12")
  queue.write_text("12|0|RUNNING|n1\n12|1|PENDING|\n")
  assert call("--launcher=slurm")[1]["submitted"] == 0
  before = (out / "units" / "RANK=8.gin").read_text()
  status, _, said = call("--launcher=slurm", "--set=STEPS=90")
  assert status == 1 and "with other settings: RANK=1, RANK=8." in said.err
  assert (out / "units" / "RANK=8.gin").read_text() == before
  status, _, said = call()
  assert status == 1 and "Slurm has queued or runs 2 units" in said.err
  status, result, said = call("--status")
  assert result["queued"] == {"running": 1, "pending": 1}
  assert result["missing"] == ["RANK=1", "RANK=8"] and "RUNNING" in said.out
  queue.write_text("12|1|PENDING|\n")
  (out / "units" / "RANK=1.log").write_text("error: no luck today\n")
  _, result, said = call("--status")
  assert (result["failed"], result["missing"]) == (["RANK=1"], ["RANK=8"])
  assert "RANK=1.log:\n  error: no luck today" in said.out
  assert call("--cancel")[1] == {"cancelled": ["RANK=8"]}
  queue.write_text("")
  assert call("--status")[1]["missing"] == ["RANK=8"]
