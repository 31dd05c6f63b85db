"""Batches that the policy samples itself, as a source of the training loop.

A `Rollouts` is a pure function of parameters and step: whatever chance it needs
comes from its seed and the step. So a run resumes bitwise, and its checkpoints
need nothing of it but the step. There is one exception: several updates may
learn from one round of samples, and a checkpoint between them has the round as
well, since the parameters that sampled it are gone.
"""

import base64
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import NamedSharding

from research.training import global_batch
from research.training.objectives.objective import Batch
from research.training.state import TrainState
from research.typing import Params, UserError

_KINDS = ("bool", "int32", "float32")
"""What a round's arrays may be."""


@dataclasses.dataclass(frozen=True)
class Round:
  """What the policy sampled at once.

  Attributes:
    common: arrays [B, ...] that all of the round's updates read.
    own: arrays [U, B, ...], for each update its own.
    metrics: numbers about the samples, such as their mean reward.
  """

  common: Mapping[str, Any]
  own: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def batch(self, update: int) -> dict[str, Any]:
    return {**self.common, **{k: x[update] for k, x in self.own.items()}}


@runtime_checkable
class Rollouts(Protocol):
  """Samples from a policy, scores the samples, and makes batches of them.

  Attributes:
    updates: updates of the parameters by one round of samples.
  """

  updates: int

  def sample_round(self, params: Params, step: int) -> Round:
    """Returns a round, which depends on the arguments alone.

    Args:
      params: the run's parameters, the frozen ones included.
      step: number of updates done, a multiple of `updates`.
    """
    ...


@runtime_checkable
class Bucketed(Protocol):
  """Endless batches of several shapes, all of which are known at the start.

  Attributes:
    shapes: shapes of this process's share of a batch, for each bucket.
  """

  shapes: Sequence[Mapping[str, jax.ShapeDtypeStruct]]

  def __iter__(self) -> Iterator[Batch]: ...


class Stream:
  """Batches of data, which do not depend on the parameters."""

  metrics: Mapping[str, float] = {}

  def __init__(self, data: Iterable[Batch], sharding: NamedSharding | None):
    self._data, self._sharding = data, sharding
    self._batches = iter(data)
    self._placed: Iterator[Batch] | None = None

  @property
  def resumable(self) -> Any:
    """What `checkpoints` asks for its position, or None."""
    batches = self._batches
    return batches if hasattr(batches, "set_state") else None

  def shapes(self, state: TrainState) -> list[Batch]:
    """Returns a batch of each shape, or its shapes, over all processes.

    The stream stays where it is.
    """
    del state
    sharding = self._sharding
    _, parts = global_batch.share(sharding)
    if isinstance(self._data, Bucketed):
      return [
        global_batch.abstract(x, sharding, parts) for x in self._data.shapes
      ]
    return [global_batch.to_global(self._first(), sharding, parts)]

  def _first(self) -> Batch:
    """Returns a batch, and leaves all of them to come."""
    if self._batches is not self._data:
      return next(iter(self._data))  # of another iterator
    if self.resumable is not None:
      position = self._batches.get_state()
      first = next(self._batches)
      self._batches.set_state(position)
      return first
    first = next(self._batches)
    self._batches = itertools.chain([first], self._batches)
    return first

  def next(self, state: TrainState, step: int) -> Batch:
    del state, step
    if self._placed is None:
      self._placed = global_batch.to_global_batches(
        self._batches, self._sharding
      )
    return next(self._placed)


class OnPolicy:
  """Batches of `Rollouts`, a round at a time."""

  def __init__(self, rollouts: Rollouts, sharding: NamedSharding | None):
    """Keeps the rollouts; samples nothing yet.

    Raises:
      UserError: a round has no updates, or there are several processes.
    """
    if rollouts.updates < 1:
      raise UserError(
        f"{type(rollouts).__name__}.updates: found {rollouts.updates}, expected"
        " at least 1."
      )
    if jax.process_count() > 1:
      raise UserError(
        f"{type(rollouts).__name__}: found {jax.process_count()} processes,"
        " expected one: samples are scored on the host that drew them."
      )
    self._rollouts, self._sharding = rollouts, sharding
    self._round: Round | None = None
    self._start = self._step = 0

  @property
  def resumable(self) -> "OnPolicy":
    return self

  @property
  def metrics(self) -> Mapping[str, float]:
    """Of the round that the newest batch is from."""
    return self._round.metrics if self._round else {}

  def shapes(self, state: TrainState) -> list[Batch]:
    """Returns the batch that `next` will return: all have its shape."""
    self._sample(state, int(state.step))
    now = self._batch(int(state.step))
    return [global_batch.to_global(now, self._sharding)]

  def next(self, state: TrainState, step: int) -> Batch:
    """Returns the batch of an update.

    Args:
      state: before the update; read at the start of a round only.
    """
    self._sample(state, step)
    self._step = step + 1
    return self._batch(step)

  def get_state(self) -> dict[str, Any]:
    """Returns the position as JSON: between rounds, a number."""
    position: dict[str, Any] = {"step": self._step, "round": None}
    left = self._round is not None and self._step % self._rollouts.updates
    if left:
      position["round"] = {
        "common": {k: _encode(k, x) for k, x in self._round.common.items()},
        "own": {k: _encode(k, x) for k, x in self._round.own.items()},
        "metrics": dict(self._round.metrics),
      }
    return position

  def set_state(self, position: Mapping[str, Any]) -> None:
    self._step, self._round = position["step"], None
    self._start = self._step - self._step % self._rollouts.updates
    saved = position["round"]
    if saved is not None:
      self._round = Round(
        {k: _decode(x) for k, x in saved["common"].items()},
        {k: _decode(x) for k, x in saved["own"].items()},
        saved["metrics"],
      )

  def _sample(self, state: TrainState, step: int) -> None:
    start = step - step % self._rollouts.updates
    if self._round is not None and self._start == start:
      return
    if step != start:
      raise UserError(
        f"rollouts: update {step} is {step - start} after its round began, and"
        " the checkpoint has no round.\nResume from one that has, or start"
        f" over: {type(self._rollouts).__name__}.updates changed?"
      )
    drawn = self._rollouts.sample_round(state.params, step)
    self._start, self._round = (
      start,
      Round(
        {name: np.asarray(x) for name, x in drawn.common.items()},
        {name: np.asarray(x) for name, x in drawn.own.items()},
        drawn.metrics,
      ),
    )

  def _batch(self, step: int) -> dict[str, Any]:
    return self._round.batch(step - self._start)


def batch_source(
  training: Iterable[Batch] | Rollouts, sharding: NamedSharding | None
) -> Stream | OnPolicy:
  """Returns where the loop's batches come from."""
  if isinstance(training, Rollouts):
    return OnPolicy(training, sharding)
  return Stream(training, sharding)


def _encode(name: str, x: Any) -> dict[str, Any]:
  x = np.ascontiguousarray(x)
  kind = x.dtype.name
  if kind not in _KINDS:
    raise UserError(
      f"rollouts: {name} is {kind}, expected one of {', '.join(_KINDS)}."
    )
  data = base64.b64encode(x.tobytes()).decode("ascii")
  return {"dtype": kind, "shape": list(x.shape), "data": data}


def _decode(encoded: Mapping[str, Any]) -> np.ndarray:
  data = base64.b64decode(encoded["data"])
  return np.frombuffer(data, encoded["dtype"]).reshape(encoded["shape"])
