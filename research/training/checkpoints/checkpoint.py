"""Saves and restores checkpoints of a run: training state and data position.

Each step contains `state` (step, trainable, optimizer state, moving average)
and `data` (the iterator's position). Frozen weights are not part of a step:
they are recorded once per run, see `frozen_base`. Checkpoints are atomic: they
are written under a temporary name and renamed. Later damage is detected by
checksums, see `checksums`.

This is the only module that imports orbax.
"""

import contextlib
import glob
import json
import logging
import math
import os
from collections.abc import Mapping
from typing import Any, Literal

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost
from orbax.checkpoint import v1 as ocp

from research.io import folders
from research.training.checkpoints import checksums, writers
from research.training.checkpoints.iterator_state import IteratorState
from research.training.state import TrainState
from research.typing import UserError

_preserve = ocp.training.preservation_policies
_decide = ocp.training.save_decision_policies

MAX_DIFFERENCES = 4
"""Maximum number of differences that an error lists."""

FORMER_NAMES = {"transformed": "held"}
"""Former names of a state's entries, which older checkpoints contain."""

DAMAGED_SUFFIX = ".damaged"
"""Name suffix of a damaged checkpoint that was moved aside."""


class Checkpoints:
  """The checkpoints of one run; a context manager.

  Keeps the latest `keep` checkpoints, one every `every` steps permanently, and
  the best one by the metric `best`.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    keep: int = 2,
    every: int = 0,
    best: str = "validation/loss",
    better: Literal["lower", "higher"] = "lower",
    sweep: bool = False,
  ):
    """Opens `folder`, creating it if needed.

    Args:
      folder: folder of the run's checkpoints, local or remote.
      every: steps between permanent checkpoints; 0 for none.
      best: the metric that determines the best checkpoint.
      better: whether lower or higher values of it are better.
      sweep: remove incomplete checkpoints left by a crash, and move damaged
        ones aside. Only for the run that writes: it would remove a checkpoint
        that another process is writing.

    Raises:
      UserError: the folder cannot be written, or has a name of a pattern.
    """
    self.folder = folders.folder(folder)
    _check_name(self.folder)
    self._sign = 1.0 if better == "lower" else -1.0
    self._best = best
    self._sweep = sweep
    self._abandoned = False
    kept = [
      _preserve.LatestN(keep),
      _preserve.BestN(
        get_metric_fn=lambda m: -m["cost"],
        n=1,
        keep_checkpoints_without_metrics=False,
      ),
      *([_preserve.EveryNSteps(every)] if every else []),
    ]
    with _quiet(), folders.writing(self.folder):
      if jax.process_index() == 0 or not sweep:
        self._check_metrics()
      _barrier()
      self._steps = ocp.training.Checkpointer(
        self.folder,
        save_decision_policy=_decide.FixedIntervalPolicy(1),
        preservation_policy=_preserve.AnyPreservationPolicy(kept),
        cleanup_tmp_directories=sweep,
      )
    # Orbax would ask JAX for sync points by the numbers of steps: a run that is
    # asked to stop in a save would miss its own (`preemption.StopPoints`). No
    # option of Orbax 0.12 turns that off; a test says if it has come back.
    self._steps._manager.reached_preemption = lambda step: False

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, error, trace) -> None:
    if self._abandoned:
      return  # closing would wait for the other processes
    # A failed save fails again on closing; the first error is more specific.
    again = contextlib.suppress(*([Exception] if error else []))
    with _quiet(), again:
      self._steps.close()

  @property
  def steps(self) -> list[int]:
    return [c.step for c in self._steps.checkpoints]

  @property
  def latest(self) -> int | None:
    return self.steps[-1] if self.steps else None

  @property
  def best(self) -> tuple[int, float] | None:
    costs = [
      (c.metrics["cost"], -c.step)
      for c in self._steps.checkpoints
      if c.metrics and math.isfinite(c.metrics["cost"])
    ]
    if not costs:
      return None
    cost, step = min(costs)
    return -step, self._sign * cost

  def save(
    self,
    state: TrainState,
    data: Any = None,
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Saves the state, synchronously: its buffers are about to be donated.

    Args:
      state: the state to save, without its frozen part.
      data: the data iterator, if it can be checkpointed. Its position must be
        the same in every process, as it is for `data.pipeline`.
      metrics: evaluation metrics of this step, including `best`.
    """
    step = int(state.step)
    moving = _moving(state)
    parts: dict[str, Any] = {"state": moving}
    note = {
      "kinds": checksums.array_types(moving),
      "sums": checksums.sums(moving),
      "place": None,
    }
    if data is not None:
      parts["data"] = place = IteratorState(json.dumps(data.get_state()))
      note["place"] = place.digest
    cost = self._sign * (metrics or {}).get(self._best, math.nan)
    with _saving() as failures, folders.writing(self.folder):
      response = self._steps.save_checkpointables_async(
        step,
        parts,
        # A checkpoint without a finite metric is never the best.
        metrics={"cost": cost} if math.isfinite(cost) else None,
        custom_metadata={"checks": note},
      )
      if failed := writers.wait(response, failures):
        self._abandoned = True
        raise failed
      if jax.process_index() == 0:
        checksums.write_list(self.folder / str(step))

  def restore(
    self, target: TrainState, data: Any = None, step: int | None = None
  ) -> TrainState:
    """Restores the state of `step` (default: the last) and the data position.

    Args:
      target: a state with the right structure, shapes, dtypes and shardings;
        its frozen part is reused.
      data: the data iterator, whose position is restored.

    Raises:
      UserError: there is no such step, it is damaged, or it does not match
        `target`.
    """
    step = self.latest if step is None else step
    if step is None or step not in self.steps:
      which = "" if step is None else f" of step {step}"
      raise UserError(
        f"{self.folder}: no checkpoint{which}; found {self.steps}.\n"
        "Expected a run that has saved one; train it further."
      )
    try:
      return self._load(step, target, data)
    except checksums.Damaged as error:
      raise UserError(
        f"{self.folder / str(step)}: damaged: {error}.\n"
        f"Use another step; found {[s for s in self.steps if s != step]}."
      ) from error

  def restore_latest(
    self, target: TrainState, data: Any = None
  ) -> tuple[TrainState, int | None]:
    """Restores the newest undamaged checkpoint; returns the state and its step.

    A damaged checkpoint is reported on stderr and moved aside
    (`<step>.damaged`); then the previous one is tried. Returns
    `(target, None)` if nothing was ever saved.

    Raises:
      UserError: it does not match `target`, or all checkpoints are damaged.
    """
    for step in reversed(steps := self.steps):
      try:
        return self._load(step, target, data), step
      except checksums.Damaged as error:
        self._set_aside(step, str(error))
        _barrier()
        self._steps.reload()
    aside = len(list(self.folder.glob(f"*{DAMAGED_SUFFIX}*")))
    if steps or aside:
      raise UserError(
        f"{self.folder}: all of its {aside or len(steps)} checkpoints are"
        " damaged.\n"
        "Expected one to resume from; to start over, choose another workdir or"
        " move this folder away."
      )
    return target, None

  def _load(self, step: int, target: TrainState, data: Any) -> TrainState:
    """Restores a state with all checks; sets the data position last."""
    where = self.folder / str(step)
    with _quiet(), checksums.raise_together():
      if bad := checksums.damaged_file(where):
        raise checksums.Damaged(bad)
      meta = self._steps.metadata(step)
      kinds = checksums.array_types(meta.metadata)
      note = (meta.custom_metadata or {}).get("checks")
      if note and kinds != note["kinds"]:
        raise checksums.Damaged(
          "state: its list of arrays is not what was saved"
        )
      if data is not None and note and note["place"] is None:
        raise UserError(
          f"{where}: was saved without a position of the data, expected one.\n"
          "Use data without one, as this run did, or another workdir."
        )
      place = None if data is None else IteratorState.read(where / "data")
      if place and note and place.digest != note["place"]:
        raise checksums.Damaged(
          "data: the iterator's position is not what was saved"
        )
    expected = _as_saved(_moving(target), kinds)
    _compare(where, kinds, expected)
    with _quiet(), checksums.raise_together():
      parts = {"state": jax.tree.map(_abstract, expected)}
      state = self._steps.load_checkpointables(step, parts)["state"]
    if note is None:
      folders.warn(f"{where}: has no checksums, so it was not verified")
    else:
      sums = checksums.sums(state)
      bad = [path for path in sums if sums[path] != note["sums"][path]]
      if bad:
        more = f" and {len(bad) - 1} more" if bad[1:] else ""
        raise checksums.Damaged(
          f"state: {bad[0]}{more} differs from its checksum"
        )
    if place:
      data.set_state(json.loads(place.text))
    current = {former: name for name, former in FORMER_NAMES.items()}
    parts = {current.get(name, name): x for name, x in state.items()}
    return TrainState(frozen=target.frozen, **parts)

  def _check_metrics(self) -> None:
    """Moves checkpoints with an unreadable metric aside, or raises."""
    for path in self.folder.glob("*/metrics/metrics"):
      step = path.parent.parent.name
      try:
        cost = json.loads(path.read_bytes())["cost"]
        whole = type(cost) in (int, float)
      except FileNotFoundError:
        continue  # the writing process has just removed it
      except (OSError, ValueError, KeyError, TypeError):
        whole = False
      if step.isdigit() and not whole:
        if not self._sweep:
          raise UserError(
            f"{path}: is damaged, expected a metric.\n"
            f"Move {path.parent.parent} away."
          )
        self._set_aside(int(step), "metrics/metrics: is no metric")

  def _set_aside(self, step: int, why: str) -> None:
    """Reports a damaged checkpoint, and renames it if sweeping."""
    where = self.folder / str(step)
    folders.warn(f"{where}: damaged checkpoint, not used: {why}")
    if not self._sweep:
      return
    if jax.process_index() == 0 and where.exists():
      taken = len(list(self.folder.glob(f"{step}{DAMAGED_SUFFIX}*")))
      suffix = f"{DAMAGED_SUFFIX}.{taken}" if taken else DAMAGED_SUFFIX
      with folders.writing(where):
        where.rename(self.folder / f"{step}{suffix}")


def has_saved(folder: folders.Folder) -> bool:
  """Whether checkpoints have been saved in a folder, damaged ones included."""
  return any(p.name[0].isdigit() for p in folder.glob("*"))


def _check_name(path: os.PathLike) -> None:
  """Raises UserError for a path that Orbax takes for a pattern of paths.

  It looks for files below a path by a pattern that begins with it: of what it
  has saved it finds nothing, so that all checkpoints seem to be damaged.
  """
  if glob.has_magic(os.fspath(path)):
    raise UserError(
      f"{path}: found one of the characters * ? [ in this path, below which"
      " checkpoints would not be found again.\nExpected a path without them;"
      " rename the folder."
    )


def _barrier() -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("checkpoints")


def wait_for_all(key: str, seconds: int) -> None:
  """Waits until all processes have called this, however long one of them takes.

  JAX's coordination service does, from which they also hear of one that has
  ended. A collective is not for that: on CPUs it gives up after 30 s.

  Args:
    key: name of this call; no other one has it.
    seconds: longest wait.
  """
  multihost.get_barrier_sync_fn()(key=key, timeout_ms=1000 * seconds)


@contextlib.contextmanager
def _quiet():
  """Silences Orbax: its progress, repeated errors, and its tasks' tracebacks.

  Errors are still raised, see `writers.awaited`.
  """
  loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
  levels = [logger.level for logger in loggers]
  for logger in loggers:
    logger.setLevel(logging.CRITICAL)
  try:
    with writers.awaited():
      yield
  finally:
    for logger, level in zip(loggers, levels, strict=True):
      logger.setLevel(level)


def _as_they_are() -> ocp.Context:
  """Disables compression: weights hardly shrink, and it is much slower."""
  context = ocp.Context()
  context.array.saving.use_compression = False
  return context


@contextlib.contextmanager
def _saving():
  """What holds while something is written; yields the writers' failures."""
  with _quiet(), writers.collect_errors() as failures, _as_they_are():
    yield failures


def _moving(state: TrainState) -> dict[str, Any]:
  moving = {
    "step": state.step,
    "trainable": state.trainable,
    "opt_state": state.opt_state,
    "ema": state.ema,
  }
  # Only if present: older checkpoints do not have this entry.
  if state.transformed is None:
    return moving
  return {**moving, "transformed": state.transformed}


def _as_saved(
  moving: Mapping[str, Any], kinds: Mapping[str, str]
) -> dict[str, Any]:
  """Returns a state's entries under their names in a checkpoint.

  Args:
    moving: the entries by their names of today.
    kinds: the checkpoint's arrays by path.
  """
  saved = {path.partition("/")[0] for path in kinds}
  former = {n: old for n, old in FORMER_NAMES.items() if old in saved}
  return {former.get(name, name): x for name, x in moving.items()}


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=getattr(x, "sharding", None)
  )


def _compare(
  where: os.PathLike, have: Mapping[str, str], expected: Any
) -> None:
  """Raises a UserError that lists the paths at which two trees differ."""
  want = checksums.array_types(expected)
  differences = [
    f"{path}: found {have.get(path, 'nothing')},"
    f" expected {want.get(path, 'nothing')}"
    for path in sorted(have.keys() | want.keys())
    if have.get(path) != want.get(path)
  ]
  if differences:
    more = len(differences) - MAX_DIFFERENCES
    rest = f"; and {more} more" if more > 0 else ""
    raise UserError(
      f"{where}: does not fit this model or optimizer.\n"
      f"{'; '.join(differences[:MAX_DIFFERENCES])}{rest}\n"
      "Use the configuration that wrote it, or another workdir."
    )


def save_tree(path: os.PathLike, arrays: Any) -> None:
  """Writes a tree of arrays atomically, replacing an existing one.

  Raises:
    UserError: the path has a name of a pattern.
  """
  _check_name(path)
  with _saving():
    ocp.save(path, arrays, overwrite=True)


def load_tree(path: os.PathLike, target: Any) -> Any:
  """Reads a tree of arrays that `save_tree` wrote.

  Args:
    target: a tree with its structure, shapes, dtypes and shardings.

  Raises:
    UserError: it does not match `target`, is damaged, or its path has a name of
      a pattern.
  """
  _check_name(path)
  with _quiet():
    _compare(path, checksums.array_types(ocp.metadata(path).metadata), target)
    try:
      return ocp.load(path, jax.tree.map(_abstract, target))
    except (MemoryError, PermissionError):
      raise
    except Exception as error:  # TensorStore raises no narrower type
      if "RESOURCE_EXHAUSTED" in str(error):
        raise
      text = str(error).strip().splitlines() or [type(error).__name__]
      raise UserError(
        f"{path}: its arrays cannot be read: {text[0][:160]}\n"
        "The checkpoint is damaged: copy it again, or create it again."
      ) from error
