"""Folders that a run writes to: local ones, or an object store's.

What has a scheme (`gs://bucket/run`) goes through `etils.epath`, everything
else is a `pathlib.Path`; both answer to the same methods.
"""

import contextlib
import os
import pathlib
import re
import sys
from typing import Any

import jax
from etils import epath

from research.typing import UserError

Folder = pathlib.Path | epath.Path

_DISK = re.compile(
  "No space left on device|Disk quota exceeded|Read-only file system"
  "|Permission denied|File too large"
)


def folder(path: str | os.PathLike) -> Folder:
  """Returns an absolute path, local or remote, of what may not exist."""
  if is_remote(path):
    return epath.Path(os.fspath(path))
  return pathlib.Path(path).absolute()


def is_remote(path: str | os.PathLike) -> bool:
  """Returns whether a path names an object store: it has a scheme."""
  return "://" in os.fspath(path)


def write_text(path: Folder, text: str) -> None:
  """Writes a file in one move: a crash leaves the old one or the new one."""
  if is_remote(path):  # an object appears when all of it has arrived
    path.write_text(text, encoding="utf-8")
    return
  draft = path.with_name(path.name + ".tmp")
  draft.write_text(text, encoding="utf-8")
  draft.replace(path)


def warn(text: str) -> None:
  """Says on stderr, once for all processes, what does not stop a run."""
  if jax.process_index() == 0:
    print(f"warning: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def writing(where: Any):
  """Turns what a full or read-only disk raises into a UserError.

  Args:
    where: to name if the error does not say which file.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    # Tensorstore raises ValueError with the system's words inside.
    if not isinstance(error, OSError) and not _DISK.search(str(error)):
      raise
    reason = getattr(error, "strerror", None) or _DISK.search(str(error))
    reason = reason if isinstance(reason, str | None) else reason[0]
    raise UserError(
      f"{getattr(error, 'filename', None) or where}: cannot be written"
      f" ({reason or error}).\nExpected a writable folder with free space; a"
      " run can resume from its last checkpoint."
    ) from error
