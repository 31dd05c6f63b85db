"""Sweeps on a real Slurm: submitted, preempted in every phase, never lost.

`make test-slurm` installs Slurm, and starts it in namespaces of its own. What
is printed is the transcript.
"""

import functools
import json
import pathlib
import re
import subprocess
import sys
import time

import pytest

from research.training.reports import metrics
from tests.multiprocess.launcher import launch
from tests.slurm import cluster

pytestmark = pytest.mark.slurm

ROOT = pathlib.Path(__file__).resolve().parents[2]
SWEEP = "tests/slurm/sweep.gin"
UNITS = [
  f"LEARNING_RATE={rate}_SEED={seed}"
  for rate in (0.003, 0.01)
  for seed in (0, 1)
]
PHASES = ("compile", "train", "evaluate", "save")
MINUTES = 15


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
  folder = tmp_path_factory.mktemp("slurm")
  # Programs are compiled each time, or there would be nothing to interrupt.
  with pytest.MonkeyPatch.context() as environment:
    environment.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    environment.setenv("JAX_PLATFORMS", "cpu")
    # What the suite compiles without optimization runs once; these run long.
    environment.delenv("XLA_FLAGS", raising=False)
    say = functools.partial(print, flush=True)
    with cluster.Cluster(folder, say) as started:
      yield started


def sweep(slurm, file, workdir, *more):
  """Runs the sweep's command; returns its result."""
  out = slurm.do(*command_of(file, workdir), *more)
  return json.loads(out.splitlines()[-1])


def phase(unit):
  """Returns what a run does now, by the last line of its metrics."""
  path = unit / "metrics.jsonl"
  try:
    lines = path.read_text().split("\n")[:-1]
    record = json.loads(lines[-1])
  except (OSError, IndexError, ValueError):
    return "start"
  step = record["step"]
  if "train/loss" in record:
    return "evaluate" if step % 4 == 0 else "train"
  if "validation/loss" in record:
    return "save"
  # Totals are written as the run begins, and after each save.
  return "compile" if "goodput/step" in record else "train"


def wait(condition, what):
  end = time.monotonic() + 60 * MINUTES
  while not condition():
    assert time.monotonic() < end, f"waited for {what}"
    time.sleep(0.05)


def losses(unit):
  """Returns step -> every metric that is a function of the run alone."""
  found = {}
  for row in metrics.read_jsonl(unit / "metrics.jsonl"):
    for name, value in row.items():
      if name.split("/")[0] in ("train", "validation"):
        found[row["step"], name] = value
  return {
    k: v
    for k, v in found.items()
    if k[1] not in ("train/seconds", "train/slow_step")
  }


def assert_the_same(found, wanted):
  """Asserts that two runs are equal in bits."""
  assert losses(found) == losses(wanted)
  assert len({step for step, _ in losses(found)}) >= 12
  one, other = (
    json.loads((x / "result.json").read_text()) for x in (found, wanted)
  )
  for name in ("perplexity_before", "perplexity_after"):
    assert one[name] == other[name]


def restarts(job):
  """Returns how often Slurm has queued a job again."""
  done = subprocess.run(
    ["scontrol", "--oneliner", "show", "job", job],
    capture_output=True,
    text=True,
    check=True,
  )
  return int(done.stdout.partition("Restarts=")[2].split()[0])


def interrupt(slurm, units, moments):
  """Interrupts each unit once, when it does what is named."""
  left = dict(moments)
  while left:
    for name, (what, command) in list(left.items()):
      if phase(units / name) == what:
        slurm.say(f"{name}: {what}")
        slurm.do(*command)
        del left[name]
    time.sleep(0.01)


def has_left(slurm, array):
  """Whether an array has left the queue."""
  listed = subprocess.run(
    ["squeue", "--noheader", "--format=%F"], capture_output=True, text=True
  )
  return listed.returncode == 0 and array not in listed.stdout.split()


def test_units_are_preempted_in_every_phase(slurm, tmp_path):
  whole, out = tmp_path / "whole", tmp_path / "out"
  sweep(slurm, SWEEP, whole, "--parallel=2")
  submit = ("--launcher=slurm", "--sbatch=--exclusive")
  array = sweep(slurm, SWEEP, out, *submit)["array"]
  jobs = [f"{array}_{i}" for i in range(4)]
  commands = [("scontrol", "requeue", job) for job in jobs]
  # As Slurm does before a job's time is over: then the script requeues it.
  commands[1] = ("scancel", "--signal=TERM", jobs[1])
  moments = dict(zip(UNITS, zip(PHASES, commands, strict=True), strict=True))
  interrupt(slurm, out / "units", moments)
  # What is queued is not submitted again.
  assert sweep(slurm, SWEEP, out, *submit)["submitted"] == 0
  wait(lambda: has_left(slurm, array), "the sweep")
  counts = [restarts(job) for job in jobs]
  slurm.say(f"restarts: {counts}")
  result = sweep(slurm, SWEEP, out, "--status")
  assert (result["done"], result["failed"], result["queued"]) == (4, [], {})
  logs = [(out / "units" / f"{name}.log").read_text() for name in UNITS]
  said = [
    "no step was taken|nothing had to be saved",
    r"step \d+ is saved\.",
    r"step \d+ is saved, but for its evaluation",
    r"step (4|8|12) is saved\.",
  ]
  for name, log, text in zip(UNITS, logs, said, strict=True):
    assert log.count("preempted: ") == 1
    slurm.say(*re.findall("preempted: .*", log))
    assert re.search(text, log), log
    assert_the_same(out / "units" / name, whole / "units" / name)
    slurm.say(f"{name}: bitwise the undisturbed run")
  assert counts == [1, 1, 1, 1]


def test_two_nodes_of_two_devices(slurm, tmp_path, monkeypatch):
  """Cancelled, preempted three times, and cut off from a node."""
  # Its lives are many; compiling was interrupted above.
  monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
  file, name, out = "tests/slurm/two_nodes.gin", "SEED=2", tmp_path / "out"
  unit = out / "units" / name
  log = unit.with_name(f"{name}.log")
  submit = ("--launcher=slurm", "--sbatch=--nodes=2", "--sbatch=--exclusive")
  array = sweep(slurm, file, out, *submit)["array"]

  # --- cancelled, it saves, and is not queued again ---
  cancel = (*command_of(file, out), "--cancel")
  interrupt(slurm, out / "units", {name: ("train", cancel)})
  wait(lambda: has_left(slurm, array), "the cancelled run")
  assert re.search(r"step \d+ is saved", log.read_text())
  result = sweep(slurm, file, out, "--status")
  assert result["missing"] == [name] and result["queued"] == {}

  # --- preempted ---
  before = life(unit)
  array = sweep(slurm, file, out, *submit)["array"]
  job = f"{array}_0"
  for count, what in enumerate(PHASES[1:], 1):
    wait(lambda old=before: life(unit) != old, "a new life")
    before = life(unit)
    requeue = ("scontrol", "requeue", job)
    interrupt(slurm, out / "units", {name: (what, requeue)})
    wait(lambda i=count: restarts(job) == i, f"the end of life {count}")

  # --- a node fails ---
  wait(lambda: life(unit) != before and phase(unit) == "train", "a step")
  node = nodes(job)[1]
  slurm.kill_node(node)
  wait(lambda: restarts(job) == len(PHASES), "Slurm to notice")
  slurm.start_node(node)
  wait(lambda: has_left(slurm, array), "the run")
  result = sweep(slurm, file, out, "--status")
  assert (result["done"], result["failed"]) == (1, [])
  found = json.loads((unit / "result.json").read_text())
  assert (found["processes"], found["devices"]) == (2, 4)
  for line in sorted(set(re.findall("preempted: .*", log.read_text()))):
    slurm.say(line)

  # --- the same, by two processes that nothing happens to ---
  done = launch(
    [
      *("-m", "experiments.train", "--nohuge_pages", "--notypecheck"),
      f"--config={unit.with_name(f'{name}.gin')}",
      f"--workdir={tmp_path / 'whole'}",
    ],
    timeout=60 * MINUTES,
  )
  assert [p.status for p in done] == [0, 0], done[0].err
  assert_the_same(unit, tmp_path / "whole")
  slurm.say(f"{name}: bitwise the undisturbed run")


def life(unit):
  """Returns a number of its own for each process that begins to write."""
  try:
    return (unit / "metrics.jsonl").stat().st_ino
  except OSError:
    return None


def command_of(file, workdir):
  return (
    *(sys.executable, "-m", "experiments.sweep", "--nohuge_pages"),
    *("--notypecheck", f"--sweep={file}", f"--workdir={workdir}"),
  )


def state(job):
  return _squeue(job, "%T")


def nodes(job):
  listed = _squeue(job, "%N")
  found = subprocess.run(
    ["scontrol", "show", "hostnames", listed], capture_output=True, text=True
  )
  return found.stdout.split()


def _squeue(job, form):
  done = subprocess.run(
    ["squeue", "--noheader", f"--jobs={job}", f"--format={form}"],
    capture_output=True,
    text=True,
  )
  return done.stdout.strip()
