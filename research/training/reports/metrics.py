"""Metric writers (JSON Lines, TensorBoard, W&B) and the progress bar.

Metrics of step n are read from the device after step n + 1 has been dispatched
(`OneStepLate`), so that the device never waits for a writer.
"""

import json
import math
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import tqdm

from research.io import folders
from research.io.folders import Folder
from research.typing import UserError

Values = Mapping[str, Any]


@runtime_checkable
class Writer(Protocol):
  """A destination for metrics."""

  def scalars(self, step: int, values: Values) -> None:
    """Writes metrics of `step`; names have the form `part/name`."""

  def close(self) -> None:
    """Flushes and closes the writer."""


WriterFactory = Callable[[Folder, int | None], Writer]
"""(workdir, step that a run resumes from or None) -> Writer."""


REMOTE_FLUSH_SECONDS = 30.0
"""Maximum delay of writes to an object store, in seconds."""


class JsonlWriter:
  """One JSON object a line: `{"step": 3, "train/loss": 2.1, ...}`.

  NaN and infinity, which JSON cannot represent, become null.
  """

  def __init__(self, path: str | os.PathLike, resume_step: int | None = None):
    """Opens `path` for appending.

    Args:
      path: the file; its folder must exist.
      resume_step: keep the lines up to this step and drop later ones (steps
        that will be repeated, a line truncated by a crash); None keeps none.
    """
    self._path = folders.folder(path)
    kept = []
    if resume_step is not None:
      kept = [r for r in read_jsonl(path) if r["step"] <= resume_step]
    text = "".join(map(_line, kept))
    self._file, self._text = None, text
    with folders.writing(self._path):
      folders.write_text(self._path, text)
      if not folders.is_remote(self._path):
        self._file = self._path.open("a", encoding="utf-8")
    self._written = time.monotonic()

  def scalars(self, step: int, values: Values) -> None:
    """Writes a line; to a remote file within `REMOTE_FLUSH_SECONDS`."""
    line = _line({"step": step, **values})
    if self._file is None:
      self._text += line
      if time.monotonic() > self._written + REMOTE_FLUSH_SECONDS:
        self.flush()
      return
    with folders.writing(self._path):
      self._file.write(line)
      self._file.flush()

  def flush(self) -> None:
    """Writes all pending lines, before a checkpoint is saved."""
    if self._file is None:
      # Object stores cannot append, so the whole file is rewritten.
      with folders.writing(self._path):
        folders.write_text(self._path, self._text)
      self._written = time.monotonic()

  def close(self) -> None:
    self.flush()
    if self._file is not None:
      with folders.writing(self._path):
        self._file.close()


def _line(record: Values) -> str:
  return json.dumps({k: _plain(v) for k, v in record.items()}) + "\n"


def _plain(x: Any) -> int | str | float | None:
  if x is None or isinstance(x, int | str):  # None: null, of a kept line
    return x
  return float(x) if math.isfinite(x) else None


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Returns the records of a metrics file; [] if it does not exist.

  Ignores an incomplete last line, which a crash may leave.

  Raises:
    UserError: a line is not a JSON object with a "step".
  """
  path = folders.folder(path)
  if not path.exists():
    return []
  records = []
  for number, line in enumerate(path.read_bytes().split(b"\n")[:-1]):
    try:
      record = json.loads(line)
      record["step"] = int(record["step"])
    except (ValueError, TypeError, KeyError) as error:
      raise UserError(
        f"{path}: line {number + 1} is not a record of a step: {line[:60]!r}.\n"
        'Expected JSON with a "step"; move the file away.'
      ) from error
    records.append(record)
  return records


class TensorBoardWriter:
  """Event files for TensorBoard, by tensorboardX."""

  def __init__(self, folder: str | os.PathLike, resume_step: int | None = None):
    """Opens `folder`; TensorBoard hides events after `resume_step`."""
    try:
      import tensorboardX
    except ImportError as error:
      raise UserError(
        "TensorBoardWriter: tensorboardX is not installed.\n"
        "In Heptad's folder: pip install -e '.[tracking]'"
      ) from error
    purge = None if resume_step is None else resume_step + 1
    self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=purge)

  def scalars(self, step: int, values: Values) -> None:
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    self._writer.close()


class WandbWriter:
  """A run of Weights & Biases."""

  def __init__(
    self,
    folder: str | os.PathLike,
    resume_step: int | None = None,
    *,
    project: str = "heptad",
  ):
    """Starts or resumes the run of `folder`, which bears its name.

    Names are not its id: stages of other runs have the same. The folder keeps
    the id, so that a run which has saved nothing yet goes on as well.
    """
    try:
      import wandb
    except ImportError as error:
      raise UserError(
        "WandbWriter: wandb is not installed.\n"
        "In Heptad's folder: pip install -e '.[tracking]'"
      ) from error
    name, here = pathlib.Path(folder).resolve().name, folders.folder(folder)
    note = here / "wandb_id.txt"
    if not note.exists():
      # Of runs from before there were notes, the name is the id.
      old = resume_step is not None and (here / "wandb").is_dir()
      with folders.writing(note):
        folders.write_text(note, name if old else uuid.uuid4().hex)
    self._run = wandb.init(
      project=project,
      id=note.read_text("utf-8"),
      name=name,
      dir=str(folder),
      resume="allow",
    )

  def scalars(self, step: int, values: Values) -> None:
    self._run.log(dict(values), step=step)

  def close(self) -> None:
    self._run.finish()


class OneStepLate:
  """Emits the metrics of each step when those of the next one arrive.

  Reading a metric waits for its step to finish on the device. By then the next
  step is already queued, so the device does not idle.
  """

  def __init__(self, emit: Callable[[int, dict[str, float]], None]):
    """Calls `emit(step, numbers)` for each push, in order, one push late."""
    self._emit = emit
    self._pending: tuple[int, Values] | None = None

  def push(self, step: int, values: Values) -> None:
    """Stores `values`, device arrays or numbers; emits the previous ones."""
    pending, self._pending = self._pending, (step, values)
    if pending is not None:
      self._out(*pending)

  def flush(self) -> None:
    pending, self._pending = self._pending, None
    if pending is not None:
      self._out(*pending)

  def _out(self, step: int, values: Values) -> None:
    self._emit(step, {k: float(v) for k, v in jax.device_get(values).items()})


def progress_bar(steps: int, done: int, shown: bool = True) -> tqdm.tqdm:
  """Returns a progress bar on stderr, updated rarely if that is no terminal.

  Args:
    done: number of steps already done.
    shown: whether to display it; only one process should.
  """
  terminal = sys.stderr.isatty()
  return tqdm.tqdm(
    total=steps,
    initial=done,
    unit="step",
    file=sys.stderr,
    disable=not shown,
    dynamic_ncols=terminal,
    mininterval=0.5 if terminal else 15,
  )
