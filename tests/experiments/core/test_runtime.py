"""What a command sets for its process, which tests share."""

import pathlib
import socket
import subprocess
import sys
import time

import jax
import pytest

from experiments.core import cli, runtime
from research.training.preemption import Preempted
from research.typing import UserError
from tests.multiprocess.launcher import catches_sigterm

ROOT = pathlib.Path(__file__).resolve().parents[3]

NAME = "jax_persistent_cache_min_compile_time_secs"
SET = (
  NAME,
  "jax_persistent_cache_min_entry_size_bytes",
  "jax_compilation_cache_dir",
)


@pytest.fixture
def kept():
  """What tests after these have is what they had before."""
  before = {name: getattr(jax.config, name) for name in SET}
  yield before
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.parametrize(("said", "want"), [("0", 0.0), (None, 0.3)])
def test_what_the_environment_says_of_the_cache_holds(
  monkeypatch, kept, said, want
):
  """A worker that has called a command keeps all programs, as before."""
  monkeypatch.delenv(NAME.upper(), raising=False)
  if said is not None:
    monkeypatch.setenv(NAME.upper(), said)
  jax.config.update(NAME, 0.0)
  runtime.setup()
  assert getattr(jax.config, NAME) == want


def test_setup_sets_nothing_that_is_not_put_back(monkeypatch, kept):
  named = []
  monkeypatch.setattr(jax.config, "update", lambda name, _: named.append(name))
  for name in SET:
    monkeypatch.delenv(name.upper(), raising=False)
  runtime.setup()
  assert set(named) == set(kept)


@pytest.mark.parametrize(
  ("words", "off"),
  [
    ([], False),
    (["--typecheck"], False),
    (["--typecheck=true"], False),
    (["--notypecheck"], True),
    (["-notypecheck"], True),
    (["--typecheck=false"], True),
    (["--typecheck=False"], True),
    (["--typecheck=0"], True),
  ],
)
def test_a_flag_is_off_where_absl_reads_so(words, off):
  assert runtime._is_off("typecheck", ["train", "--workdir=a", *words]) == off
  values = cli.new_flags()
  values(["train", *words])
  assert values["typecheck"].value != off
  values["typecheck"].unparse()  # commands share it


TRAIN = (sys.executable, "-m", "experiments.train", "--nohuge_pages")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_that_imports_ends_as_one_that_is_preempted(tmp_path):
  with subprocess.Popen(
    [*TRAIN, f"--workdir={tmp_path}"], stderr=subprocess.PIPE, cwd=ROOT
  ) as process:
    end = time.monotonic() + 60
    while not catches_sigterm(process.pid):
      assert time.monotonic() < end and process.poll() is None
      time.sleep(0.002)
    process.terminate()
    _, said = process.communicate(timeout=60)
  assert process.returncode == runtime.PREEMPTED == Preempted.exit_status
  assert said == b"preempted: asked to stop; nothing had to be saved.\n"


@pytest.mark.parametrize("left_out", ["COORDINATOR_ADDRESS", "NUM_PROCESSES"])
def test_an_environment_that_says_half_of_it_is_an_error(monkeypatch, left_out):
  """Each of the processes would train alone, in the same directory."""
  says = {"COORDINATOR_ADDRESS": "a:1", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}

  def initialize(**_):  # as JAX does, where it finds no cluster
    raise ValueError("Number of processes must be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  for name in says:
    monkeypatch.delenv(f"JAX_{name}", raising=False)
  assert not runtime._connect(runtime.Cluster())
  del says[left_out]
  for name, value in says.items():
    monkeypatch.setenv(f"JAX_{name}", value)
  with pytest.raises(UserError, match=f"JAX_{left_out}=None.* all three"):
    runtime._connect(runtime.Cluster())


FAIL = """
import threading, time
from experiments.core import cli, runtime
from research.typing import UserError
runtime.PATIENCE = 0.2
def main(argv):
  threading.Thread(target=time.sleep, args=(300,)).start()
  raise UserError("no luck today")
cli.run(main)
"""


def test_no_thread_delays_the_end_of_a_run_that_failed():
  """Orbax's wait 300 s for a folder that a full disk has no room for."""
  done = subprocess.run(
    [sys.executable, "-c", FAIL],
    capture_output=True,
    text=True,
    timeout=100,
    cwd=ROOT,
  )
  assert (done.returncode, done.stderr) == (1, "error: no luck today\n")


@pytest.mark.multiprocess
@pytest.mark.slow
def test_so_does_one_that_waits_for_the_others(tmp_path):
  """Process 1 of 2, which calls a process 0 that does not answer."""
  with socket.socket() as listening:
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    listening.settimeout(120)
    given = [
      "--config=tests/multiprocess/tiny.gin",
      f"--workdir={tmp_path / 'run'}",
      f"--coordinator=127.0.0.1:{listening.getsockname()[1]}",
      *("--processes=2", "--process=1", "--devices=1"),
    ]
    with subprocess.Popen(
      [*TRAIN, *given], stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
      connection, _ = listening.accept()
      with connection:
        time.sleep(0.5)
        process.terminate()
        _, said = process.communicate(timeout=60)
  assert process.returncode == runtime.PREEMPTED
  assert b"nothing had to be saved" in said
  assert not (tmp_path / "run").exists()
