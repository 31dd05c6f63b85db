"""The loop: restore, compile, step, evaluate, save.

`fit` reads straight down. A run is a function of its plan, its data and its
seed: ten steps are bitwise five, a crash, and five more, since a step's key is
`fold_in(key(seed), step)` and the data's place is saved with the state.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding

from research import sharding as shardings
from research.io import folders
from research.optim import ranges
from research.training import evaluating, global_batch, memory, preemption
from research.training.aot import StateTransform, compile_step
from research.training.checkpoints import unevaluated
from research.training.checkpoints.checkpoint import Checkpoints
from research.training.checkpoints.frozen_base import record_base
from research.training.evaluating import Evaluations
from research.training.objectives.objective import Batch, Objective
from research.training.reports import metrics as reports
from research.training.reports.goodput import Goodput
from research.training.reports.report import Report
from research.training.state import TrainState
from research.training.step import make_train_step
from research.typing import PRNGKey, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """How long to train, and when to look up.

  Attributes:
    steps: updates in all, over every resumption.
    seed: of whatever is random in a step.
    accumulate: microbatches in a batch.
    average: decay of the moving average, where the state keeps one.
    eval_every: steps between evaluations; 0 for one at the end only.
    save_every: steps between checkpoints besides those that follow each
      evaluation and the last step; 0 for none.
    keep: latest checkpoints to keep, besides the best.
    keep_every: steps between checkpoints that are kept for good; 0 for none.
    best: the metric that decides which is best.
    better: which way.
    profile: (first step, number of steps) to trace, counted from the start of
      this process, or None.
  """

  steps: int
  seed: int = 0
  accumulate: int = 1
  average: float | int = 0.999
  eval_every: int = 0
  save_every: int = 0
  keep: int = 2
  keep_every: int = 0
  best: str = "validation/loss"
  better: Literal["lower", "higher"] = "lower"
  profile: tuple[int, int] | None = None

  def __post_init__(self):
    every = ("eval_every", "save_every", "keep_every")
    least = {"steps": 1, "accumulate": 1, "keep": 1}
    for name, low in {**least, **dict.fromkeys(every, 0)}.items():
      if getattr(self, name) < low:
        raise UserError(
          f"Plan.{name}: found {getattr(self, name)}, expected at least {low}."
        )
    ranges.share("Plan", average=self.average)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """What a run leaves behind.

  Attributes:
    state: the state after the last step.
    start: updates that were done before this process began.
    best: (step, metric) of the best checkpoint, or None.
    evaluation: metrics of the last evaluation in this process.
    tokens_per_s: of training alone in this process; None if it did no step.
    seconds: by what was being done in this process, see `Goodput`.
    goodput: totals over all processes that this run took, see `Goodput`.
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
  training: Iterable[Batch],
  plan: TrainConfig,
  *,
  workdir: str | os.PathLike,
  evaluations: Evaluations | None = None,
  source: Mapping[str, Any] | None = None,
  writers: Sequence[reports.WriterFactory] = (),
  rewrites: Sequence[StateTransform] = (),
  sharding: NamedSharding | None = None,
  began: float | int | None = None,
) -> Outcome:
  """Trains from `state`, or from the workdir's last checkpoint if it has one.

  Every process of a run calls this with equal arguments, but for its share of
  `training`; all stop at the same step, whatever the reason.

  Args:
    objective: the loss.
    tx: the optimizer that `state` was made with.
    state: where to start. It is consumed: its trainable part is donated.
    training: endless batches of one shape, this process's share of the rows
      (`global_batch.share`); `iter` of it is checkpointed if it is a grain iterator.
    plan: how long, and when to look up.
    workdir: gets `metrics.jsonl`, `checkpoints/` and `profile/`.
    evaluations: name -> whole batches; metrics are written as `name/metric`.
    source: where the frozen weights can be had again, see `record_base`.
    writers: further writers besides `metrics.jsonl`.
    rewrites: of the state, after each step, in order.
    sharding: of batches `[B, T]`, on the mesh that `state` lives on; None for
      a state on one device.
    began: when this process began (`time.time()`), for the account of time.

  Raises:
    UserError: a loss or gradient that is not finite (with step and metric),
      another base or structure than the workdir's, a batch of another shape.
    Preempted: it was asked to end (`preemption`); the state has been saved.
  """
  workdir = folders.folder(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  clock, evaluation = Goodput(began), {}
  points, batches = preemption.StopPoints(), iter(training)
  with contextlib.ExitStack() as stack:
    # --- restore ---
    folder = workdir / "checkpoints"
    checkpoints = stack.enter_context(
      Checkpoints(
        folder,
        keep=plan.keep,
        every=plan.keep_every,
        best=plan.best,
        better=plan.better,
        sweep=True,
      )
    )
    with clock.doing("restore"):
      record_base(folder, state.frozen, source)
      data = _resumable(batches)
      state, resumed = checkpoints.restore_latest(state, data)
      state, left = unevaluated.restore(workdir, state, data, resumed)
    start = int(state.step)
    report = stack.enter_context(
      Report(
        workdir,
        writers,
        resumed if left is None else left,
        plan.steps,
        clock,
        lambda: checkpoints.latest,
      )
    )
    report.write(start, clock.summary())
    evaluate_step = evaluating.compiled(objective, sharding)

    def evaluated(state: TrainState) -> dict[str, float] | None:
      """Returns a step's evaluation, or None where it was left."""
      try:
        with clock.doing("evaluate"):
          found = evaluating.evaluate_all(
            evaluate_step, state, evaluations, sharding, points.reached
          )
      except evaluating.Stopped:
        return None
      report.write(int(state.step), found)
      return found

    def save(state: TrainState, found: dict[str, float] | None) -> None:
      with clock.doing("save"):
        report.flush()
        checkpoints.save(state, _resumable(batches), found)
      report.write(int(state.step), clock.summary())
      points.unsaved(False)

    def leave(saved: str) -> NoReturn:
      raise preemption.Preempted(
        f"{workdir}: asked to stop; {saved}.\n"
        "The same command goes on from there."
      )

    # --- what a run was asked to leave ---
    if left is not None:
      if _looks(plan, start, evaluations):
        evaluation = evaluated(state)
        if evaluation is None:
          leave(f"step {start} is saved, but for its evaluation")
      save(state, evaluation or None)
      unevaluated.remove(workdir)

    # --- compile ---
    key = _key(plan.seed, sharding)
    if start < plan.steps:
      with clock.doing("compile"):
        # The first batch of another iterator: this one must not move.
        _, parts = global_batch.share(sharding)
        first = global_batch.place(next(iter(training)), sharding, parts)
        step = make_train_step(objective, tx, plan.accumulate, plan.average)
        update, cost = compile_step(step, state, first, key, rewrites)
      report.write(start, cost)
      if points.reached():
        leave(f"step {start} is saved" if start else "no step was taken")

    # --- train ---
    moving, frozen = dataclasses.replace(state, frozen=None), state.frozen
    placed = global_batch.placed(batches, sharding)
    report.restart()
    for number in range(start + 1, plan.steps + 1):
      last = number == plan.steps
      looking = _looks(plan, number, evaluations)
      with clock.doing("data"):
        batch = next(placed)
      with clock.doing("step"), _traced(plan, number - start, last, report):
        points.unsaved(True)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
          moving, values = update(moving, frozen, batch, key)
        report.late.push(number, {**values, "tokens": _tokens(batch)})
        leaving = points.reached()
        saving = looking or _due(plan.save_every, number, last or leaving)
        if saving:
          report.late.flush()  # nothing that is not finite gets past here

      # --- evaluate and save ---
      found = None
      if looking and not leaving:
        found = evaluated(dataclasses.replace(moving, frozen=frozen))
        evaluation, leaving = found or {}, found is None
      if looking and leaving:
        with clock.doing("save"):
          report.flush()
          unevaluated.save(workdir, moving, _resumable(batches))
        leave(f"step {number} is saved, but for its evaluation")
      if saving:
        save(moving, found)
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
      tokens_per_s=report.tokens / trained if start < plan.steps else None,
      seconds=dict(clock.seconds),
      goodput=clock.summary(),
      peak_memory_bytes=memory.peak_memory_bytes(),
    )


def _looks(
  plan: TrainConfig, number: int, evaluations: Evaluations | None
) -> bool:
  """Whether a step is evaluated."""
  return bool(evaluations) and _due(
    plan.eval_every, number, number == plan.steps
  )


def _key(seed: int, sharding: NamedSharding | None) -> PRNGKey:
  """Returns the run's key, on every device of the mesh."""
  if sharding is None:
    return jax.random.key(seed)
  where = shardings.replicated(sharding.mesh)
  return jax.jit(jax.random.key, static_argnums=0, out_shardings=where)(seed)


def _due(every: int, number: int, last: bool) -> bool:
  return last or (every > 0 and number % every == 0)


def _resumable(batches: Any) -> Any:
  return batches if hasattr(batches, "set_state") else None


def _tokens(batch: Batch) -> int:
  return int(np.prod(batch["tokens"].shape)) if "tokens" in batch else 0


@contextlib.contextmanager
def _traced(plan: TrainConfig, number: int, last: bool, report: Report):
  """Traces the steps that `plan.profile` names, for TensorBoard or xprof."""
  first, count = plan.profile or (0, 0)
  if number == first:
    jax.profiler.start_trace(report.workdir / "profile")
  yield
  tracing = first <= number < first + count
  if tracing and (last or number == first + count - 1):
    report.late.flush()  # waits for the step
    jax.profiler.stop_trace()
