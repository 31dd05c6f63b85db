"""Two processes are one: the same run, whoever computes it, ends or goes on.

Runs of eight steps (`tiny.gin`) by two processes of two devices, by this
process on eight, four and one, and by each of them in turn.
"""

import json
import pathlib
import re
import shutil
import signal
import socket
import sys
import time

import numpy as np
import pytest
from safetensors import numpy as safetensors

from experiments.core import config, train_eval
from research.training.checkpoints.workdir import (
  LENGTH_AND_MESH_LINES,
  claim_workdir,
)
from research.training.reports.metrics import read_jsonl
from tests.multiprocess.launcher import catches_sigterm, launch

pytestmark = pytest.mark.multiprocess

CONFIG = str(pathlib.Path(__file__).with_name("tiny.gin"))
MESH = ("DATA=2", "FSDP=2")
STOP = "loop.TrainConfig.steps={}"


def _arguments(command, workdir, *bindings):
  given = [f"--set={binding}" for binding in bindings]
  return [command, f"--config={CONFIG}", f"--workdir={workdir}", *given]


def _together(*commands):
  """Runs commands by two processes; returns what the first one printed."""
  first, second = launch(
    ["-m", "tests.multiprocess.worker", f"--do={json.dumps(commands)}"]
  )
  assert (first.status, second.status) == (0, 0), first.err + second.err
  assert "{" not in second.out  # one process of them speaks
  # Where the rows are cut each reads its half; where they are not, all.
  for i, done in enumerate((first, second)):
    assert f"share ({i}, 2)\nshare (0, 1)\n" in done.out
  lines = first.out.splitlines()
  return [json.loads(line) for line in lines if line.startswith("{")]


def _alone(workdir, *bindings):
  read = config.read(CONFIG, list(bindings))
  folder = claim_workdir(workdir, read.text, LENGTH_AND_MESH_LINES)
  return train_eval.train(read.experiment, folder)


def _losses(workdir):
  records = read_jsonl(workdir / "metrics.jsonl")
  steps = [(r["step"], r["train/loss"]) for r in records if "train/loss" in r]
  assert [step for step, _ in steps] == list(range(1, 9))
  return np.array([loss for _, loss in steps])


def _weights(workdir):
  return safetensors.load_file(workdir / "model" / "model.safetensors")


def _assert_close(found, wanted):
  """Asserts the same run, but for the order in which sums are added.

  A loss of about 4 in float32 has an ulp of 5e-7. A step of Adam moves a
  weight by up to 1e-2 whatever its gradient's size, so errors grow with the
  smallest gradients: 1e-4 is a hundredth of a step.
  """
  np.testing.assert_allclose(_losses(found), _losses(wanted), rtol=1e-5)
  a, b = _weights(found), _weights(wanted)
  assert a.keys() == b.keys() and len(a) > 10
  for name in a:
    np.testing.assert_allclose(a[name], b[name], atol=1e-4, err_msg=name)


def _assert_bitwise(found, wanted):
  np.testing.assert_array_equal(_losses(found), _losses(wanted))
  a, b = _weights(found), _weights(wanted)
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def whole(folder):
  """A run by two processes, and its evaluation."""
  workdir = folder / "whole"
  result, found = _together(
    _arguments("train", workdir, *MESH),
    _arguments("evaluate", workdir, *MESH),
  )
  assert result["processes"] == 2 and result["devices"] == 4
  return workdir, result, found


@pytest.mark.slow
def test_two_processes_of_two_devices_are_one_of_four(whole, folder):
  workdir, result, _ = whole
  alone = _alone(folder / "alone", *MESH)
  assert alone["processes"] == 1 and alone["devices"] == 4
  _assert_close(workdir, folder / "alone")
  for name in ("perplexity_before", "perplexity_after", "validation/loss"):
    assert result[name] == pytest.approx(alone[name], rel=1e-5), name
  table = (folder / "alone" / "parameters.txt").read_text()
  assert (workdir / "parameters.txt").read_text() == table
  assert "fsdp" in table and "bytes/device" in table


@pytest.mark.slow
def test_evaluation_by_two_processes(whole):
  _, result, found = whole
  # In bits: the same program on the same devices.
  assert found["validation/loss"] == result["validation/loss"]
  assert found["heldout/perplexity"] == result["perplexity_after"]


@pytest.fixture(scope="module")
def preempted(whole, folder):
  """A run of which one process is asked to stop, by Ctrl-C.

  Which sends itself the SIGTERM that JAX's service tells the other one of.
  """

  def during(running):
    # It has a handler when it has a working directory.
    until = time.monotonic() + 120
    while not (folder / "asked" / "config.gin").exists():
      assert time.monotonic() < until and running[1].poll() is None
      time.sleep(0.02)
    running[1].send_signal(signal.SIGINT)

  arguments = _arguments("train", folder / "asked", *MESH)
  command = ["-m", "experiments.train", *arguments[1:]]
  for _ in range(3):
    shutil.rmtree(folder / "asked", ignore_errors=True)
    done = launch(command, during=during, compiled_before=False)
    # JAX's service takes a second or two to tell; eight steps may be quicker.
    if any(p.status for p in done):
      break
  return done


@pytest.fixture(scope="module")
def resumed(whole, preempted, folder):
  """A copy stays behind as it was when it stopped; the run goes on."""
  shutil.copytree(folder / "asked", folder / "parts")
  return _together(_arguments("train", folder / "asked", *MESH))


@pytest.mark.slow
def test_ctrl_c_in_one_process_ends_both_with_42(preempted, folder):
  assert [p.status for p in preempted] == [42, 42], "".join(
    p.err for p in preempted
  )
  # Noticed where both have compiled, or after the same step.
  said = [re.search(r"asked to stop; (.*)\.\n", p.err)[1] for p in preempted]
  steps = [int(p.name) for p in (folder / "asked/checkpoints").glob("[0-9]*")]
  step = f"step {max(steps)} is saved" if steps else "no step was taken"
  assert said == [step, step] and max(steps, default=0) < 8
  assert not (folder / "asked" / "result.json").exists()


@pytest.mark.slow
def test_after_that_the_run_is_bitwise_the_undisturbed_one(
  whole, resumed, folder
):
  _assert_bitwise(folder / "asked", whole[0])
  assert resumed[0]["validation/loss"] == whole[1]["validation/loss"]


@pytest.mark.slow
def test_other_devices_and_processes_go_on_with_the_same_data(
  whole, resumed, folder
):
  """Four devices in two processes -> 8 in one -> 1 -> two processes again."""
  parts = folder / "parts"
  _alone(parts, "FSDP=4", "TENSOR=2", STOP.format(5))
  _alone(parts, STOP.format(6))
  _together(_arguments("train", parts, *MESH))
  _assert_close(parts, whole[0])


def _listens(process):
  """Whether a first process waits for the others to connect."""
  [flag] = [x for x in process.args if x.startswith("--coordinator=")]
  host, port = flag.partition("=")[2].split(":")
  with socket.socket() as s:
    return s.connect_ex((host, int(port))) == 0


def _wait(until):
  end = time.monotonic() + 120
  while not until():
    assert time.monotonic() < end
    time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("where", ["connecting", "computing"])
def test_sigterm_while_one_process_waits_for_the_other(whole, folder, where):
  """The other one stands still; both get the signal, as from a scheduler."""
  workdir = folder / where

  def during(running):
    first, second = running
    if where == "connecting":
      _wait(lambda: catches_sigterm(second.pid))
      second.send_signal(signal.SIGSTOP)
      _wait(lambda: _listens(first))
    else:
      _wait((workdir / "config.gin").exists)
      second.send_signal(signal.SIGSTOP)
    time.sleep(1)  # the first one needs the second now
    for process in running:
      process.send_signal(signal.SIGTERM)
    time.sleep(3)  # longer than an end that waits for nobody takes
    second.send_signal(signal.SIGCONT)

  arguments = _arguments("train", workdir, *MESH)
  command = ["-m", "experiments.train", *arguments[1:]]
  done = launch(command, during=during, compiled_before=False)
  said = "".join(process.err for process in done)
  assert [process.status for process in done] == [42, 42], said
  assert (
    "asked to stop" in done[0].err and not (workdir / "result.json").exists()
  )
  if where == "connecting":
    assert not workdir.exists()

  _together(arguments)
  _assert_bitwise(workdir, whole[0])
