"""The lock of a working directory, against another process."""

import contextlib
import errno
import fcntl
import pathlib
import socket
import subprocess
import sys
import threading

import optax
import pytest

from experiments.core import config
from experiments.searching import running as searches
from experiments.searching.search_run import SearchRun
from experiments.stages import running
from research.training.checkpoints import run_lock
from research.training.loop import TrainConfig, fit
from research.training.state import create
from research.typing import UserError
from tests.experiments.stages import test_stages

SEARCH = str(
  pathlib.Path(__file__).parents[3] / "experiments" / "searching" / "tiny.gin"
)

OTHER = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
file.write(f"process 7 on {sys.argv[2]}\\n")
file.flush()
print("locked", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def locked_by_another(workdir, host=socket.gethostname()):
  """Another process trains in a directory, until it is killed."""
  workdir.mkdir(exist_ok=True)
  where = str(workdir / run_lock.FILE), host
  command = [sys.executable, "-S", "-c", OTHER, *where]
  pipe = subprocess.PIPE
  with subprocess.Popen(command, stdin=pipe, stdout=pipe) as other:
    try:
      assert other.stdout.readline() == b"locked\n"
      yield other
    finally:
      other.kill()


def test_two_processes_do_not_train_in_one_directory(tmp_path):
  """Nor does the second one change a file; after a SIGKILL it may."""
  workdir = tmp_path / "run"
  words = f"process 7 on {socket.gethostname()} works there"
  read = config.read(test_stages.TINY)
  with locked_by_another(workdir):
    with pytest.raises(UserError, match=words):
      running.claim(read.experiment, read.text, workdir)
    with pytest.raises(UserError, match=words), run_lock.locked(workdir):
      pass
    assert [x.name for x in workdir.iterdir()] == [run_lock.FILE]
  with run_lock.locked(workdir), run_lock.locked(workdir):
    pass
  running.claim(read.experiment, read.text, workdir)
  assert (workdir / "config.gin").is_file()


def test_two_searches_do_not_add_to_one_pool(tmp_path):
  read = config.read(SEARCH, root=SearchRun)
  with locked_by_another(tmp_path), pytest.raises(UserError, match="works"):
    searches.complete(read.experiment, tmp_path, read.text)
  assert [x.name for x in tmp_path.iterdir()] == [run_lock.FILE]


def test_a_machine_that_crashed_keeps_its_lock_for_a_while(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(run_lock, "INTERVAL", 0.05)
  with locked_by_another(tmp_path, "elsewhere") as other:
    ends = threading.Timer(0.5, other.kill)
    ends.start()
    with run_lock.locked(tmp_path):
      pass
  said = capsys.readouterr().err
  assert said.count("waits up to 120 s for process 7 on elsewhere") == 1
  monkeypatch.setattr(run_lock, "PATIENCE", 0.1)
  with (
    locked_by_another(tmp_path, "elsewhere"),
    pytest.raises(UserError, match="process 7 on elsewhere works there"),
    run_lock.locked(tmp_path),
  ):
    pass


REMOTE = """
import fcntl, struct, sys
file = open(sys.argv[1], "a+")
lock = struct.pack("hhqqi", fcntl.F_WRLCK, 0, 0, 0, 0)
fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
file.write(f"process 7 on {sys.argv[2]}\\n")
file.flush()
print("locked", flush=True)
sys.stdin.read()
"""
"""Like NFS for a machine that is gone, Linux names no process here that has
this lock, which is an open file's."""


@pytest.mark.skipif(sys.platform != "linux", reason="locks of Linux")
def test_a_crashed_machine_may_have_had_our_name(tmp_path, monkeypatch, capsys):
  """As pods of a JobSet do that start again, and a node that has rebooted."""
  monkeypatch.setattr(run_lock, "INTERVAL", 0.05)
  monkeypatch.setattr(sys.modules[__name__], "OTHER", REMOTE)
  with locked_by_another(tmp_path) as other:
    ends = threading.Timer(0.5, other.kill)
    ends.start()
    with run_lock.locked(tmp_path):
      pass
  name = f"process 7 on {socket.gethostname()}"
  assert f"waits up to 120 s for {name}" in capsys.readouterr().err


def test_a_locked_file_that_cannot_be_read_is_another_process(
  tmp_path, monkeypatch
):
  """Locks of Windows' shares are mandatory: reading fails, too."""

  class Unreadable:
    def __getattr__(self, name):
      return getattr(file, name)

    def read(self):
      raise PermissionError(errno.EACCES, "Permission denied")

  monkeypatch.setattr(run_lock, "PATIENCE", 0.0)
  with (
    locked_by_another(tmp_path),
    (tmp_path / run_lock.FILE).open("a+") as file,
    pytest.raises(UserError, match="another process works there"),
  ):
    run_lock._lock(Unreadable(), tmp_path / run_lock.FILE)


def test_an_inner_lock_does_not_unlock_the_outer_one(tmp_path):
  script = "import fcntl, sys\nfile = open(sys.argv[1], 'a+')\n"
  script += "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)"
  command = [sys.executable, "-S", "-c", script, tmp_path / run_lock.FILE]
  with run_lock.locked(tmp_path):
    with run_lock.locked(tmp_path):
      pass
    assert subprocess.run(command, stderr=subprocess.PIPE).returncode == 1
  assert subprocess.run(command).returncode == 0


def test_the_loop_locks_its_directory(tmp_path, line):
  (objective, params, numbers), tx = line, optax.sgd(0.1)
  given = objective, tx, create(params, "w", tx), numbers()
  with locked_by_another(tmp_path), pytest.raises(UserError, match="works"):
    fit(*given, TrainConfig(steps=1), workdir=tmp_path)


def test_a_file_system_without_locks_trains_all_the_same(tmp_path, monkeypatch):
  def unsupported(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "lockf", unsupported)
  with run_lock.locked(tmp_path):
    pass
