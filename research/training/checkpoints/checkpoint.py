"""Checkpoints of a run: what moved, and where the data stood.

Each step holds `state` (step, trainable, optimizer state, moving average) and
`data` (the iterator's place). Frozen weights are not part of a step: they are
recorded once a run, see `base`. A checkpoint is whole or it is not there: it
is written aside and renamed. What happens to it later is found out by the
checksums that it carries, see `checks`.

The only file that imports orbax.
"""

import contextlib
import json
import logging
import math
import os
from collections.abc import Mapping
from typing import Any, Literal

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from research.io import folders
from research.training.checkpoints import checksums
from research.training.checkpoints.iterator_state import IteratorState
from research.training.state import TrainState
from research.typing import UserError

_preserve = ocp.training.preservation_policies
_decide = ocp.training.save_decision_policies

SHOWN = 4
"""How many differences an error lists before it counts the rest."""

ASIDE = ".damaged"
"""What the name of a checkpoint that is not whole ends with."""


class Checkpoints:
  """The checkpoints of one run; a context manager.

  Kept are the latest `keep`, every `every` steps for good, and the best by the
  metric `best`.
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
    """Opens `folder`, and makes it if need be.

    Args:
      folder: of the run's checkpoints, local or remote.
      keep: how many of the latest to keep.
      every: steps between those that are kept for good; 0 for none.
      best: the metric that decides which is best.
      better: which way.
      sweep: remove what a crash left half written, and move what is damaged
        aside; only for the one run that writes, since it would remove another
        one's checkpoint in the making.

    Raises:
      UserError: the folder cannot be written.
    """
    self.folder = folders.folder(folder)
    self._sign = 1.0 if better == "lower" else -1.0
    self._best = best
    self._sweep = sweep
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
      _meet()
      self._steps = ocp.training.Checkpointer(
        self.folder,
        save_decision_policy=_decide.FixedIntervalPolicy(1),
        preservation_policy=_preserve.AnyPreservationPolicy(kept),
        cleanup_tmp_directories=sweep,
      )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, error, trace) -> None:
    # A failed save fails again on closing; the first error says more.
    again = contextlib.suppress(*([Exception] if error else []))
    with _quiet(), again:
      self._steps.close()

  @property
  def steps(self) -> list[int]:
    """The steps that exist, in order."""
    return [c.step for c in self._steps.checkpoints]

  @property
  def latest(self) -> int | None:
    """The last step, or None."""
    return self.steps[-1] if self.steps else None

  @property
  def best(self) -> tuple[int, float] | None:
    """The best step and its metric, or None where none was evaluated."""
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
    """Writes the state's step, and waits: its buffers are about to be donated.

    Args:
      state: what to save; its frozen part is left out.
      data: the very iterator that was consumed, if it can be checkpointed. Its
        place is the same on every process, as it is for `data.pipeline`.
      metrics: results at this step; the one named by `best` decides.
    """
    step = int(state.step)
    moving = _moving(state)
    parts: dict[str, Any] = {"state": moving}
    note = {
      "kinds": checksums.kinds(moving),
      "sums": checksums.sums(moving),
      "place": None,
    }
    if data is not None:
      parts["data"] = place = IteratorState(json.dumps(data.get_state()))
      note["place"] = place.digest
    cost = self._sign * (metrics or {}).get(self._best, math.nan)
    with _quiet(), _as_they_are(), folders.writing(self.folder):
      self._steps.save_checkpointables(
        step,
        parts,
        # A checkpoint without a finite metric is never the best.
        metrics={"cost": cost} if math.isfinite(cost) else None,
        custom_metadata={"checks": note},
      )
      if jax.process_index() == 0:
        checksums.write_list(self.folder / str(step))

  def restore(
    self, target: TrainState, data: Any = None, step: int | None = None
  ) -> TrainState:
    """Returns the state of `step` (default: the last), and moves `data` there.

    Args:
      target: a state with the structure, shapes, types and shardings to get;
        its frozen part is passed on.
      data: the iterator to set to where it stood.
      step: which one.

    Raises:
      UserError: no such step, it is damaged, or it differs from `target`.
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
    """Returns the newest state that is whole, and its step.

    A damaged one is named on stderr and moved aside (`<step>.damaged`), and
    the one before it is tried. Where nothing was ever saved, the result is
    `(target, None)`.

    Args:
      target: see `restore`.
      data: the iterator to set to where it stood.

    Raises:
      UserError: it differs from `target`, or there are only damaged ones.
    """
    for step in reversed(steps := self.steps):
      try:
        return self._load(step, target, data), step
      except checksums.Damaged as error:
        self._set_aside(step, str(error))
        _meet()
        self._steps.reload()
    aside = len(list(self.folder.glob(f"*{ASIDE}*")))
    if steps or aside:
      raise UserError(
        f"{self.folder}: none of its {aside or len(steps)} checkpoints is"
        " whole.\n"
        "Expected one to go on from; to begin again, choose another workdir or"
        " move this folder away."
      )
    return target, None

  def _load(self, step: int, target: TrainState, data: Any) -> TrainState:
    """Returns a state after all its checks; `data` moves last of all."""
    where, wanted = self.folder / str(step), _moving(target)
    with _quiet(), checksums.agreed():
      if bad := checksums.damaged_file(where):
        raise checksums.Damaged(bad)
      meta = self._steps.metadata(step)
      found = checksums.kinds(meta.metadata)
      note = (meta.custom_metadata or {}).get("checks")
      if note and found != note["kinds"]:
        raise checksums.Damaged(
          "state: its list of arrays is not what was saved"
        )
      place = None if data is None else IteratorState.read(where / "data")
      if place and note and place.digest != note["place"]:
        raise checksums.Damaged(
          "data: the iterator's place is not what was saved"
        )
    _compare(where, found, wanted)
    with _quiet(), checksums.agreed():
      parts = {"state": jax.tree.map(_abstract, wanted)}
      state = self._steps.load_checkpointables(step, parts)["state"]
    if note is None:
      folders.warn(f"{where}: has no checksums, so none were compared")
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
    return TrainState(frozen=target.frozen, **state)

  def _check_metrics(self) -> None:
    """Moves steps aside whose metric cannot be read, or raises."""
    for path in self.folder.glob("*/metrics/metrics"):
      step = path.parent.parent.name
      try:
        cost = json.loads(path.read_bytes())["cost"]
        whole = type(cost) in (int, float)
      except FileNotFoundError:
        continue  # whoever writes has just removed it
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
    """Says what is wrong with a step, and takes it out of the way."""
    where = self.folder / str(step)
    folders.warn(f"{where}: damaged checkpoint, not used: {why}")
    if not self._sweep:
      return
    if jax.process_index() == 0 and where.exists():
      taken = len(list(self.folder.glob(f"{step}{ASIDE}*")))
      suffix = f"{ASIDE}.{taken}" if taken else ASIDE
      with folders.writing(where):
        where.rename(self.folder / f"{step}{suffix}")


def _meet() -> None:
  """Waits for all processes: what one has moved, the others must not see."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("checkpoints")


@contextlib.contextmanager
def _quiet():
  """Keeps Orbax from telling how it works, and each error once a thread.

  What is wrong is raised; nothing is lost.
  """
  loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
  levels = [logger.level for logger in loggers]
  for logger in loggers:
    logger.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    for logger, level in zip(loggers, levels, strict=True):
      logger.setLevel(level)


def _as_they_are() -> ocp.Context:
  """Arrays uncompressed: weights hardly shrink, and it takes much longer."""
  context = ocp.Context()
  context.array.saving.use_compression = False
  return context


def _moving(state: TrainState) -> dict[str, Any]:
  moving = {
    "step": state.step,
    "trainable": state.trainable,
    "opt_state": state.opt_state,
    "ema": state.ema,
  }
  # Only then: what was saved before there was such a part has none.
  return moving if state.held is None else {**moving, "held": state.held}


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=getattr(x, "sharding", None)
  )


def _compare(where: os.PathLike, have: Mapping[str, str], wanted: Any) -> None:
  """Raises a UserError that lists the paths in which two trees differ."""
  want = checksums.kinds(wanted)
  differences = [
    f"{path}: found {have.get(path, 'nothing')},"
    f" expected {want.get(path, 'nothing')}"
    for path in sorted(have.keys() | want.keys())
    if have.get(path) != want.get(path)
  ]
  if differences:
    more = len(differences) - SHOWN
    rest = f"; and {more} more" if more > 0 else ""
    raise UserError(
      f"{where}: does not fit this model or optimizer.\n"
      f"{'; '.join(differences[:SHOWN])}{rest}\n"
      "Use the configuration that wrote it, or another workdir."
    )


def save_tree(path: os.PathLike, arrays: Any) -> None:
  """Writes a tree of arrays, whole or not at all; replaces what is there."""
  with _quiet(), _as_they_are():
    ocp.save(path, arrays, overwrite=True)


def load_tree(path: os.PathLike, target: Any) -> Any:
  """Returns the tree that `save_tree` wrote.

  Args:
    path: where it is.
    target: a tree with its structure, shapes, types and shardings.

  Raises:
    UserError: what it holds differs from `target`, or is damaged.
  """
  with _quiet():
    _compare(path, checksums.kinds(ocp.metadata(path).metadata), target)
    try:
      return ocp.load(path, jax.tree.map(_abstract, target))
    except (MemoryError, PermissionError):
      raise
    except Exception as error:  # TensorStore's are of no narrower kind
      if "RESOURCE_EXHAUSTED" in str(error):
        raise
      text = str(error).strip().splitlines() or [type(error).__name__]
      raise UserError(
        f"{path}: its arrays cannot be read: {text[0][:160]}\n"
        "The checkpoint is damaged: copy it again, or make it anew."
      ) from error
