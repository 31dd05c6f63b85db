"""Folders that a run writes to: local ones, or an object store's.

What has a scheme (`gs://bucket/run`) goes through `etils.epath`, everything
else is a `pathlib.Path`; both answer to the same methods.
"""

import contextlib
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from research.errors import UserError, WriteError

Folder = pathlib.Path | epath.Path

_DISK = re.compile(
  "No space left on device|Disk quota exceeded|Read-only file system"
  "|Permission denied|File too large"
)


def folder(path: str | os.PathLike) -> Folder:
  """Returns an absolute path, local or remote, of what may not exist.

  Raises:
    UserError: a scheme that checkpoints cannot be written to, or without the
      package that it takes.
  """
  if not is_remote(path):
    return pathlib.Path(path).absolute()
  scheme = os.fspath(path).split("://")[0]
  if scheme != "gs":  # Orbax's arrays know no other store
    raise UserError(
      f"{path}: found {scheme}://, expected a local path or gs://bucket/path.\n"
      "Mount other stores as a folder, e.g. with mountpoint-s3 or rclone."
    )
  try:
    import fsspec

    fsspec.get_filesystem_class("gcs")
  except ImportError as error:
    raise UserError(
      f"{path}: needs gcsfs; pip install -e '.[gcs]' in Heptad's folder"
    ) from error
  return epath.Path(os.fspath(path))


def is_remote(path: str | os.PathLike) -> bool:
  """Returns whether a path names an object store: it has a scheme."""
  return "://" in os.fspath(path)


def read_text(file: pathlib.Path) -> str:
  """Returns a file's text; UserError if it cannot be read."""
  try:
    return file.read_text("utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{file}: not a readable UTF-8 file: {error}") from error


def write_text(path: Folder, text: str) -> None:
  """Writes a file in one move: a crash leaves the old one or the new one.

  Of several processes that write it at once, one does. A link stays, and what
  it leads to is written.
  """
  # An object appears when all of it has arrived; a device such as /dev/full is
  # written to, never replaced by a file.
  if (
    is_remote(path)
    or (path.exists() and not path.is_file())
    or (path.is_symlink() and _leads_to_stream(path))
  ):
    path.write_text(text, encoding="utf-8")
    return
  path = path.resolve() if path.is_symlink() else path
  draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  try:
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
  except BaseException:
    with contextlib.suppress(OSError):
      draft.unlink(missing_ok=True)  # a full disk needs the room
    raise


def _leads_to_stream(link: pathlib.Path) -> bool:
  """Whether a link is one such as /dev/stdout, which may be a file."""
  places = link.parent.resolve(), link.readlink()
  return any(place.parts[1:2] == ("proc",) for place in places)


def check_free(to: pathlib.Path, file: bool = False) -> None:
  """Checks a path that is written to at the end of long work.

  Args:
    to: of a new file or directory.
    file: whether it is a file; a directory may exist if it is empty.

  Raises:
    UserError: something is there, or a file where its folder is to be.
  """
  if to.is_dir() and not file and not any(to.iterdir()):
    return
  if to.exists() or to.is_symlink():
    raise UserError(
      f"{to}: is already there; expected a new name. Move or delete it first."
    )
  above = next((x for x in to.absolute().parents if x.exists()), None)
  if above is not None and not above.is_dir():
    raise UserError(
      f"{to}: cannot be written, since {above} is a file, expected a folder."
    )


@contextlib.contextmanager
def locally(path: Folder) -> Iterator[pathlib.Path]:
  """Gives a local folder for what can only write to such.

  Args:
    path: the folder that the files are for: itself, if it is local; else they
      are copied there at the end.
  """
  if not is_remote(path):
    yield path
    return
  with tempfile.TemporaryDirectory() as name:
    local = pathlib.Path(name)
    yield local
    with writing(path):
      for file in sorted(x for x in local.rglob("*") if x.is_file()):
        target = path / file.relative_to(local).as_posix()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())


def warn(text: str) -> None:
  """Says on stderr, once for all processes, what does not stop a run.

  Each process says it that has not yet found the others: asking for its index
  would start a backend, with which they cannot be found any more.
  """
  jax = sys.modules.get("jax")
  connected = jax is not None and jax.distributed.is_initialized()
  if not (connected and jax.process_index()):
    print(f"warning: {text}", file=sys.stderr, flush=True)


def is_disk_error(error: BaseException) -> bool:
  """Returns whether a disk is full or read-only, by the system's words."""
  return _DISK.search(str(error)) is not None


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
    if not isinstance(error, OSError) and not is_disk_error(error):
      raise
    reason = getattr(error, "strerror", None) or _DISK.search(str(error))
    reason = reason if isinstance(reason, str | None) else reason[0]
    raise WriteError(
      f"{getattr(error, 'filename', None) or where}: cannot be written"
      f" ({reason or error}).\nExpected a writable folder with free space; a"
      " run can resume from its last checkpoint."
    ) from error
