"""The lock of a working directory: one command at a time writes to it.

Two commands in one directory, such as a run that a launcher has started again
while the first one still runs, would remove each other's checkpoints and write
metrics into files that the other has replaced. So the first process of a run
locks a file there (POSIX record locks: they end with the process, however it
ends, are not inherited by children, and reach over NFS).
"""

import contextlib
import errno
import fcntl
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator

import jax

from research.io import folders
from research.io.folders import Folder
from research.training import preemption
from research.typing import UserError

FILE = "run.lock"

PATIENCE, INTERVAL = 120.0, 1.0
"""Seconds to wait for a process that is not on this machine, and between two
tries: NFS keeps the locks of a machine that has crashed for a lease, 90 s by
default."""

_TAKEN = (errno.EACCES, errno.EAGAIN)

_UNKNOWN = "another process"

_FLOCK = "hhqqi"
"""Linux' `struct flock`: type, whence, start, length, process."""

_locked: set[Folder] = set()
"""Directories that this process has locked: POSIX would lock them again, and
unlock them at the end of the inner lock."""


@contextlib.contextmanager
def locked(workdir: Folder) -> Iterator[None]:
  """Context in which no other process works in a directory.

  It does nothing inside of another one for the same directory, in processes
  that do not write, and for object stores and file systems without locks.

  Args:
    workdir: created if it is missing.

  Raises:
    UserError: another process works there, or it cannot be written.
    Preempted: the run was asked to stop while it waited.
  """
  if folders.is_remote(workdir) or jax.process_index():
    yield
    return
  key = workdir.resolve()
  if key in _locked:
    yield
    return
  path = workdir / FILE
  with folders.writing(path):
    workdir.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")  # opening must not erase another one's name
  with file:
    _lock(file, path)
    _locked.add(key)
    try:
      yield
    finally:
      _locked.remove(key)


def _lock(file, path: Folder) -> None:
  """Locks an open file until it is closed, and writes who has locked it."""
  here, deadline = socket.gethostname(), time.monotonic() + PATIENCE
  waits = False
  while owner := _owner(file):
    ours = owner.endswith(f" on {here}") and _is_alive_here(file)
    if ours or time.monotonic() > deadline:
      raise UserError(
        f"{path.parent}: {owner} works there, expected no other one.\nWait for"
        " it, or end it: a run saves first. If it is gone, and its file system"
        f" has kept the lock, delete {path}."
      )
    if not waits:
      folders.warn(f"{path}: waits up to {PATIENCE:.0f} s for {owner}")
      waits = True
    preemption.leave_if_asked()
    time.sleep(INTERVAL)
  # A full disk is no reason to work without a lock.
  with contextlib.suppress(OSError):
    file.truncate(0)
    os.pwrite(file.fileno(), f"process {os.getpid()} on {here}\n".encode(), 0)


def _owner(file) -> str | None:
  """Locks an open file; returns who has, if that is another process."""
  try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in _TAKEN:
      # Windows' shares (CIFS) do not let others read a locked file, either.
      with contextlib.suppress(OSError):
        file.seek(0)
        return file.read().strip() or _UNKNOWN
      return _UNKNOWN
  return None  # on a file system without locks as well


def _is_alive_here(file) -> bool:
  """Whether a process of this machine has the lock of an open file.

  The name in the file does not say: a pod that starts again has the name of the
  one whose machine crashed, and a machine that booted again has its own.
  """
  if sys.platform != "linux":
    return False
  asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
  try:
    answer = fcntl.fcntl(file, fcntl.F_GETLK, asked)
  except OSError:
    return False
  return struct.unpack(_FLOCK, answer)[-1] > 0  # of NFS, 0 or negative
