"""The training loop: restore, compile, step, evaluate, save.

A run is a deterministic function of its config, data and seed. Ten steps are
bitwise equal to five steps, a crash and five more, because a step's key is
`fold_in(key(seed), step)` and the data iterator's position is saved with the
state. Samples of the policy itself depend on parameters and step alone
(`rollouts`).
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding

from research import sharding as shardings
from research.io import folders
from research.ranges import (
  NonNegativeInt,
  PositiveFloat,
  PositiveInt,
  Ranged,
  Share,
)
from research.training import evaluating, memory, preemption
from research.training.aot import StateTransform, compile_steps
from research.training.checkpoints import run_lock, unevaluated
from research.training.checkpoints.checkpoint import Checkpoints, has_saved
from research.training.checkpoints.frozen_base import record_base
from research.training.evaluating import Evaluations
from research.training.objectives.objective import Batch, Objective
from research.training.reports import metrics as reports
from research.training.reports.goodput import Goodput
from research.training.reports.report import Report
from research.training.rollouts import Rollouts, batch_source
from research.training.state import TrainState
from research.training.step import make_train_step
from research.training.watchdog import Watchdog
from research.typing import PRNGKey, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Ranged):
  """Duration of training, and the schedule of evaluations and checkpoints.

  Attributes:
    steps: total number of updates, across all resumptions.
    seed: random seed of the steps.
    accumulate: microbatches per batch (gradient accumulation).
    average: decay of the moving average of the weights, if the state has one;
      else the default.
    eval_every: steps between evaluations; 0 for one at the end only.
    save_every: steps between checkpoints, in addition to those after each
      evaluation and the last step; 0 for none.
    keep_every: steps between checkpoints that are never deleted; 0 for none.
    best: the metric that determines the best checkpoint.
    better: whether lower or higher values of it are better.
    stalled_after: seconds without progress of any process after which a run of
      several says which one hangs, and ends (`watchdog`); None for never. It
      must exceed a step, a compilation, a save and an evaluation.
    profile: (first step, number of steps) to trace with the JAX profiler,
      counted from the start of this process, or None.
  """

  steps: PositiveInt
  seed: NonNegativeInt = 0
  accumulate: PositiveInt = 1
  average: Share = 0.999
  eval_every: NonNegativeInt = 0
  save_every: NonNegativeInt = 0
  keep: PositiveInt = 2
  keep_every: NonNegativeInt = 0
  best: str = "validation/loss"
  better: Literal["lower", "higher"] = "lower"
  stalled_after: PositiveFloat | None = 3600
  profile: tuple[PositiveInt, PositiveInt] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """The result of a run.

  Attributes:
    start: number of updates done before this process started.
    best: (step, metric) of the best checkpoint, or None.
    tokens_per_s: training throughput in this process, without padding,
      evaluation and saving; None if it did no step.
    seconds: seconds per activity in this process, see `Goodput`.
    goodput: totals over all processes of this run, see `Goodput`.
    peak_memory_bytes: see `memory.peak_memory_bytes`.
  """

  state: TrainState
  start: int
  best: tuple[int, float] | None
  evaluation: dict[str, float]
  tokens_per_s: float | None
  seconds: dict[str, float]
  goodput: dict[str, float]
  peak_memory_bytes: int


def fit(
  objective: Objective,
  tx: optax.GradientTransformation,
  state: TrainState,
  training: Iterable[Batch] | Rollouts,
  config: TrainConfig,
  *,
  workdir: str | os.PathLike,
  evaluations: Evaluations | None = None,
  source: Mapping[str, Any] | None = None,
  writers: Sequence[reports.WriterFactory] = (),
  state_transforms: Sequence[StateTransform] = (),
  sharding: NamedSharding | None = None,
  started_at: float | int | None = None,
) -> Outcome:
  """Trains from `state`, or from the workdir's last checkpoint if it has one.

  All processes of a run call this with equal arguments, except for their share
  of `training`. They stop at the same step, whatever the reason.

  Args:
    state: the initial state. Its trainable part is donated.
    training: endless batches with this process's share of the rows
      (`global_batch.share`), of one shape, or of as many as it says
      (`Bucketed`), for each of which a program is compiled. The iterator is
      checkpointed if it is one of grain's. Or `Rollouts`, which sample them
      from the parameters.
    workdir: receives `metrics.jsonl`, `checkpoints/` and `profile/`.
    evaluations: name -> whole batches; metrics are written as `name/metric`.
    source: where the frozen weights can be loaded from, see `record_base`.
    writers: metric writers in addition to `metrics.jsonl`.
    state_transforms: applied to the state after each step, in order.
    sharding: sharding of batches `[B, T]`, on the mesh of `state`; None for a
      state on one device.
    started_at: start time of this process (`time.time()`), for `Goodput`.

  Raises:
    UserError: another process trains in the workdir, the loss or gradient is
      not finite (names step and metric), the base weights or the structure
      differ from the workdir's, it is at a later step than the last, a batch
      has a shape that no program was compiled for, or `config.average` is
      given for a state without a moving average.
    Preempted: a stop was requested (`preemption`); the state has been saved.
  """
  if state.ema is None and config.average != TrainConfig.average:
    raise UserError(
      f"TrainConfig.average: found {config.average} for a state without a"
      f" moving average, expected\nthe default, {TrainConfig.average}; or"
      " create the state with average=True."
    )
  workdir = folders.folder(workdir)
  clock, evaluation = Goodput(started_at), {}
  points, batches = preemption.StopPoints(), batch_source(training, sharding)
  processes = jax.process_index(), jax.process_count()
  with contextlib.ExitStack() as stack:
    stack.enter_context(run_lock.locked(workdir))
    watched = stack.enter_context(
      Watchdog(workdir, *processes, patience=config.stalled_after)
    )
    # --- restore ---
    folder = workdir / "checkpoints"
    checkpoints = stack.enter_context(
      Checkpoints(
        folder,
        keep=config.keep,
        every=config.keep_every,
        best=config.best,
        better=config.better,
        sweep=True,
      )
    )
    watched.doing("restoring")
    with clock.doing("restore"):
      saved = has_saved(folder) or (workdir / unevaluated.NAME).is_dir()
      record_base(folder, state.frozen, source, saved)
      data = batches.resumable
      state, resumed = checkpoints.restore_latest(state, data)
      state, left = unevaluated.restore(workdir, state, data, resumed)
    start = int(state.step)
    if start > config.steps:
      raise UserError(
        f"{workdir}: is at step {start}, expected at most TrainConfig.steps,"
        f" {config.steps}.\nSet at least {start} steps, or choose another"
        " workdir."
      )
    if start and data is None:
      folders.warn(
        f"{workdir}: resumes at step {start}, but its data has no position:"
        " they start over"
      )
    report = stack.enter_context(
      Report(
        workdir,
        writers,
        resumed if left is None else left,
        config.steps,
        clock,
        lambda: checkpoints.latest,
      )
    )
    report.write(start, clock.summary())
    evaluate_step = evaluating.compiled(objective, sharding)
    times = preemption.SaveTimes(_saved_bytes(state))

    # Once for the names of a run's evaluations, not after each of them.
    check_best = functools.cache(functools.partial(_check_best, config.best))

    def evaluated(state: TrainState) -> dict[str, float] | None:
      watched.doing(
        f"evaluating step {int(state.step)}", "an evaluation's batch"
      )
      try:
        with clock.doing("evaluate"):
          metrics = evaluating.evaluate_all(
            evaluate_step, state, evaluations, sharding, points.reached
          )
      except evaluating.Stopped:
        return None
      report.write(int(state.step), metrics)
      check_best(tuple(sorted(metrics)))
      return metrics

    @contextlib.contextmanager
    def saving_in_time(requested: bool) -> Iterator[None]:
      """Says it before a save that takes longer than a launcher waits."""
      watched.doing("saving", "a checkpoint")
      if text := times.too_long(requested):
        folders.warn(f"{workdir}: {text}")
      begin = clock.seconds["save"]
      with clock.doing("save"):
        report.flush()
        yield
      times.measured(clock.seconds["save"] - begin)

    def save(
      state: TrainState,
      metrics: dict[str, float] | None,
      requested: bool = False,
    ) -> None:
      with saving_in_time(requested):
        checkpoints.save(state, batches.resumable, metrics)
      report.write(int(state.step), clock.summary())
      points.unsaved(False)

    def leave(saved: str) -> NoReturn:
      raise preemption.Preempted(
        f"{workdir}: asked to stop; {saved}.\n"
        "The same command resumes from there."
      )

    # --- evaluate a step that was interrupted before its evaluation ---
    if left is not None:
      if _is_evaluated(config, start, evaluations):
        evaluation = evaluated(state)
        if evaluation is None:
          leave(f"step {start} is saved, but for its evaluation")
      save(state, evaluation or None)
      unevaluated.remove(workdir)

    # --- compile ---
    key = _key(config.seed, sharding)
    if start < config.steps:
      watched.doing("compiling")
      with clock.doing("compile"):
        shapes = batches.shapes(state)
        step = make_train_step(objective, tx, config.accumulate, config.average)
        update, cost = compile_steps(step, state, shapes, key, state_transforms)
      report.write(start, cost)
      if points.reached():
        leave(f"step {start} is saved" if start else "no step was taken")

    # --- train ---
    moving, frozen = dataclasses.replace(state, frozen=None), state.frozen
    report.restart()
    for number in range(start + 1, config.steps + 1):
      last = number == config.steps
      looking = _is_evaluated(config, number, evaluations)
      watched.doing(f"reading the batch of step {number}")
      with clock.doing("data"):
        batch = batches.next(
          dataclasses.replace(moving, frozen=frozen), number - 1
        )
      with clock.doing("step"), _traced(config, number - start, last, report):
        points.unsaved(True)
        watched.doing(
          f"computing step {number}", f"the update of step {number}"
        )
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
          moving, values = update(moving, frozen, batch, key)
        values = {"tokens": _positions(batch), **values, **batches.metrics}
        report.late.push(number, values)
        leaving = points.reached()
        saving = looking or _due(config.save_every, number, last or leaving)
        if saving:
          report.late.flush()  # raises for non-finite values before saving

      # --- evaluate and save ---
      metrics = None
      if looking and not leaving:
        metrics = evaluated(dataclasses.replace(moving, frozen=frozen))
        evaluation, leaving = metrics or {}, metrics is None
      if looking and leaving:
        with saving_in_time(True):
          unevaluated.save(workdir, moving, batches.resumable)
        leave(f"step {number} is saved, but for its evaluation")
      if saving:
        save(moving, metrics, leaving)
        report.restart()
        if leaving or points.reached():
          leave(f"step {number} is saved")

    # --- finish ---
    trained = clock.seconds["step"] + clock.seconds["data"]
    return Outcome(
      state=dataclasses.replace(moving, frozen=frozen),
      start=start,
      best=checkpoints.best,
      evaluation=evaluation or {},
      tokens_per_s=report.tokens / trained if start < config.steps else None,
      seconds=dict(clock.seconds),
      goodput=clock.summary(),
      peak_memory_bytes=memory.peak_memory_bytes(),
    )


def _is_evaluated(
  config: TrainConfig, number: int, evaluations: Evaluations | None
) -> bool:
  return bool(evaluations) and _due(
    config.eval_every, number, number == config.steps
  )


def _check_best(best: str, names: Sequence[str]) -> None:
  """Warns if evaluations do not measure what the best checkpoint is by."""
  if names and best not in names:
    folders.warn(
      f"TrainConfig.best: found {best!r}, which is not measured, so no"
      f" checkpoint is the best; expected one of {', '.join(names)}."
    )


def _key(seed: int, sharding: NamedSharding | None) -> PRNGKey:
  if sharding is None:
    return jax.random.key(seed)
  where = shardings.replicated(sharding.mesh)
  return jax.jit(jax.random.key, static_argnums=0, out_shardings=where)(seed)


def _saved_bytes(state: TrainState) -> int:
  """Returns the bytes that this process has of a checkpoint, about."""
  leaves = jax.tree.leaves(dataclasses.replace(state, frozen=None))
  return sum(x.nbytes for x in leaves) // jax.process_count()


def _due(every: int, number: int, last: bool) -> bool:
  return last or (every > 0 and number % every == 0)


def _positions(batch: Batch) -> int:
  """Returns the positions of a batch, padding included."""
  return int(np.prod(batch["tokens"].shape)) if "tokens" in batch else 0


@contextlib.contextmanager
def _traced(config: TrainConfig, number: int, last: bool, report: Report):
  """Traces the steps that `config.profile` names, for TensorBoard or xprof."""
  first, count = config.profile or (0, 0)
  if number == first:
    jax.profiler.start_trace(report.workdir / "profile")
  yield
  tracing = first <= number < first + count
  if tracing and (last or number == first + count - 1):
    report.late.flush()  # waits for the step
    jax.profiler.stop_trace()
