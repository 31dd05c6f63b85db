"""Trains and evaluates an experiment. No flags, no gin.

Commands and notebooks call these functions with an `Experiment`.
"""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.core import (
  artifacts,
  cli,
  data_fingerprint,
  device_context,
  runtime,
)
from experiments.core.experiment import BuiltExperiment, Experiment
from research import progress, sharding, tree, weights
from research.data.bucketing import BucketedBatches
from research.data.pipeline import Pipeline, ShuffledRows
from research.data.rendering import ConversationSource
from research.generation import generate
from research.interop.loaded import Loaded
from research.io.folders import Folder
from research.training import evaluating, global_batch, loop, state, watchdog
from research.training.checkpoints import checkpoint, frozen_base
from research.training.reports import metrics
from research.typing import UserError


def train(
  experiment: Experiment,
  workdir: Folder,
  writers: Sequence[Any] = (),
  started_at: float | None = None,
) -> dict[str, Any]:
  """Trains `experiment` in `workdir`; returns its result.

  Of several processes, each calls this; the first one writes. A finished run is
  left as it is.

  Args:
    started_at: when the work on it began (`time.time()`), as a command's, which
      began with its process; None for now.

  Raises:
    Preempted: the run was asked to end (`training.preemption`), and is saved.
    UserError: an error that the user can mend.
  """
  if started_at is None:
    started_at = time.time()
  old = runtime.first_process_first(
    lambda: finished_result(experiment, workdir)
  )
  if old is not None:
    cli.log(
      f"{workdir}: this run has finished, after {old['steps']} steps; its"
      " result follows.\nTo train further, pass more steps (--set=STEPS=...);"
      " to write its files again, delete result.json."
    )
    return old
  with device_context.on_mesh(experiment.mesh) as context:
    return _train(experiment, context, workdir, writers, started_at)


def finished_result(
  experiment: Experiment, workdir: Folder
) -> dict[str, Any] | None:
  """Returns the result of a finished run, else None."""
  try:
    old = json.loads((workdir / "result.json").read_text("utf-8"))
  except (FileNotFoundError, ValueError):
    return None
  steps = old.get("steps") if isinstance(old, dict) else None
  if type(steps) is not int or steps < experiment.plan.steps:
    return None
  # It was written last; but the workdir may have lost its checkpoints since.
  return old if (workdir / "checkpoints" / str(steps)).is_dir() else None


def _train(
  experiment: Experiment,
  context: device_context.DeviceContext,
  workdir: Folder,
  writers: Sequence[Any],
  started_at: float,
) -> dict[str, Any]:
  begin = time.perf_counter()
  runtime.first_process_first(lambda: data_fingerprint.check_files(experiment))
  if isinstance(experiment.data, ShuffledRows):
    global_batch.check_rows(context.batch, experiment.data.batch_size)
  if runtime.is_first_process():  # for which the others wait below
    watchdog.clear(workdir)

  # --- model ---
  cli.loading(experiment.model)
  built = experiment.build(context)
  experiment, context = experiment.with_encoder_of(built), built.context
  start = _start(experiment, built)
  trainable, total = map(weights.count, (start.trainable, start.params))
  _log_parameters(experiment, built, trainable, total, workdir)

  # --- data ---
  tokenizer = runtime.first_process_first(
    lambda: data_fingerprint.restore_tokenizer(
      experiment, built.loaded.tokenizer, workdir, keep=True
    )
  )
  built = built.with_tokenizer(tokenizer)
  texts = runtime.first_process_first(
    lambda: data_fingerprint.claim(experiment, workdir)
  )
  data_fingerprint.check_context(experiment, built.loaded.model, tokenizer)
  training = experiment.training(built, tokenizer)
  for name, bucket in _data_report(training).get("buckets", {}).items():
    cli.log(f"batches of {name}: {bucket}")
  evaluations = experiment.evaluations(tokenizer)
  heldout = evaluations.pop("heldout", None)

  # --- train ---
  with progress.phase(None):  # the loop has a progress bar
    outcome = loop.fit(
      built.objective,
      experiment.optimizer,
      start,
      training,
      experiment.plan,
      workdir=workdir,
      evaluations=evaluations,
      source=built.loaded.source,
      writers=writers,
      state_transforms=experiment.state_transforms,
      sharding=context.batch,
      started_at=started_at,
    )

  # --- results ---
  heldout_metrics = _heldout_metrics(experiment, built, outcome.state, heldout)
  (_, before), (_, after) = heldout_metrics.values()
  answers = _answers(experiment, built, outcome.state)
  judged = _judged(experiment, built, outcome.state)
  title = f"{workdir.name}: {trainable:,} trainable of {total:,}"
  readable = artifacts.save(
    experiment, built, outcome.state, workdir, heldout_metrics, title
  )
  result = {
    "perplexity_before": before and perplexity(before["loss"]),
    "perplexity_after": after and perplexity(after["loss"]),
    "loss_before": before and before["loss"],
    "loss_after": after and after["loss"],
    "bits_per_byte": data_fingerprint.bits_per_byte(
      experiment, tokenizer, after
    ),
    "trainable_parameters": trainable,
    "total_parameters": total,
    "parameter_bytes": sum(x.nbytes for x in jax.tree.leaves(built.params)),
    "seconds": time.perf_counter() - begin,
    "tokens_per_s": outcome.tokens_per_s,
    "peak_memory_bytes": outcome.peak_memory_bytes,
    "seconds_to_first_step": _seconds_to_first_step(workdir, outcome),
    "seconds_by_part": outcome.seconds,
    "goodput": outcome.goodput["goodput/fraction"],
    "best": outcome.best,
    "devices": 1 if context.mesh is None else context.mesh.size,
    "processes": jax.process_count(),
    "steps": experiment.plan.steps,
    "texts": texts,
    **_data_report(training),
    "special_tokens": data_fingerprint.describe_special_tokens(tokenizer),
    **(outcome.evaluation or _last_evaluation(experiment, workdir)),
    **answers,
    **judged,
    "workdir": str(workdir),
  }
  artifacts.write_text(
    workdir / "result.json", json.dumps(cli.plain(result), indent=2) + "\n"
  )
  loaded = None
  if readable:
    loaded = artifacts.with_masks(built.loaded, experiment.objective)
  data = experiment.data
  chats = isinstance(data, Pipeline) and isinstance(
    data.source, ConversationSource
  )
  cli.log(artifacts.next_commands(workdir, loaded, result["devices"], chats))
  return result


def _heldout_metrics(
  experiment: Experiment,
  built: BuiltExperiment,
  trained: state.TrainState,
  heldout: Any,
) -> dict[str, tuple[int, Any]]:
  """Returns (step, metrics of the held-out text) before and after training.

  Both are measured after training, so that the first step comes early and the
  program is compiled once.
  """
  measure = evaluating.compiled(built.objective, built.context.batch)
  before, after = (
    _sample_and_evaluate(experiment, built, measure, each, heldout, when)
    for when, each in (
      ("before", _untrained(experiment, built, trained)),
      ("after", trained),
    )
  )
  return {"before": (0, before), "after": (experiment.plan.steps, after)}


def _data_report(training: Any) -> dict[str, Any]:
  """Returns what is in the buckets and what in none, where there are any."""
  return dict(training.report) if isinstance(training, BucketedBatches) else {}


def _last_evaluation(
  experiment: Experiment, workdir: Folder
) -> dict[str, float]:
  """Returns the metrics of the last step's evaluation, from metrics.jsonl."""
  found: dict[str, float] = {}
  for record in metrics.read_jsonl(workdir / "metrics.jsonl"):
    if record["step"] == experiment.plan.steps:
      named = {k: v for k, v in record.items() if k.startswith("validation/")}
      found |= named
  return found


def evaluate(
  experiment: Experiment,
  workdir: Folder | None = None,
  number: int | None = None,
) -> dict[str, Any]:
  """Evaluates `experiment` on its validation and held-out data.

  Args:
    workdir: the run's, with checkpoints; None for the model before training.
    number: step of the checkpoint; None for the best, or else the last.
  """
  with device_context.on_mesh(experiment.mesh) as context:
    return _evaluate(experiment, context, workdir, number)


def _evaluate(experiment, context, workdir, number) -> dict[str, Any]:
  data_fingerprint.check_files(experiment, data_fingerprint.EVALUATIONS)
  built = experiment.build(context)
  experiment, context = experiment.with_encoder_of(built), built.context
  if workdir is None:
    at, trained = 0, _start(experiment, built)
  else:
    tokenizer = built.loaded.tokenizer
    built = built.with_tokenizer(
      data_fingerprint.restore_tokenizer(experiment, tokenizer, workdir)
    )
    at, trained = restore_checkpoint(experiment, built, workdir, number)
  tokenizer = built.loaded.tokenizer
  data_fingerprint.check_context(experiment, built.loaded.model, tokenizer)
  evaluations = experiment.evaluations(tokenizer)
  asks = experiment.answers or experiment.step_report
  if not evaluations and asks is None:
    raise UserError("this experiment has neither validation nor heldout data")
  measure = evaluating.compiled(built.objective, context.batch)
  found = evaluating.evaluate_all(measure, trained, evaluations, context.batch)
  for name in evaluations:
    found[f"{name}/perplexity"] = perplexity(found[f"{name}/loss"])
  heldout = {
    name.removeprefix("heldout/"): value
    for name, value in found.items()
    if name.startswith("heldout/")
  }
  return {
    "step": at,
    **found,
    "bits_per_byte": data_fingerprint.bits_per_byte(
      experiment, tokenizer, heldout or None
    ),
    "special_tokens": data_fingerprint.describe_special_tokens(tokenizer),
    **_answers(experiment, built, trained),
    **_judged(experiment, built, trained),
  }


def _answers(
  experiment: Experiment, built: BuiltExperiment, trained: state.TrainState
) -> dict[str, Any]:
  """Logs what the model's answers are worth; returns a result's entry of it."""
  # Token by token, as a continuation is: see `_sample_and_evaluate`.
  if experiment.answers is None or jax.process_count() > 1:
    return {}
  report = experiment.answers(_trained(built, trained))
  cli.log(f"answers, % right:\n{report}\n")
  return {"answers": report.to_json()}


def _judged(
  experiment: Experiment, built: BuiltExperiment, trained: state.TrainState
) -> dict[str, Any]:
  """Logs how well steps are judged; returns a result's entries of it."""
  if experiment.step_report is None or jax.process_count() > 1:
    return {}
  report = experiment.step_report(_trained(built, trained))
  cli.log(f"labelled steps: {report}\n")
  every = report.to_json()
  main = (
    *("f1", "f1_random", "accuracy_error", "accuracy_correct"),
    *("auc", "auc_error", "threshold"),
  )
  return {name: every[name] for name in main} | {"step_report": every}


def _trained(built: BuiltExperiment, trained: state.TrainState) -> Loaded:
  return dataclasses.replace(built.loaded, params=trained.params)


def _start(experiment: Experiment, built: BuiltExperiment) -> state.TrainState:
  return state.create(
    built.params,
    experiment.trainable,
    experiment.optimizer,
    transformed=experiment.transformed,
    shardings=built.context.placement,
  )


def restore_checkpoint(
  experiment: Experiment,
  built: BuiltExperiment,
  workdir: Folder,
  number: int | None = None,
) -> tuple[int, state.TrainState]:
  """Returns (step, state) of a checkpoint of a run.

  Args:
    number: step of the checkpoint; None for the best, or else the last.
  """
  folder = workdir / "checkpoints"
  if not folder.is_dir():
    raise UserError(
      f"{workdir}: found no checkpoints/; train the run first, with"
      " experiments.train"
    )
  with checkpoint.Checkpoints(
    folder, best=experiment.plan.best, better=experiment.plan.better
  ) as kept:
    best = kept.best[0] if kept.best else kept.latest
    at = best if number is None else number
    start = _start(experiment, built)
    frozen_base.warn_of_other_base(folder, start.frozen, built.loaded.source)
    return at, kept.restore(start, step=at)


def last_step(workdir: Folder) -> int:
  """Returns the last step that a run has saved, 0 if none."""
  names = (path.name for path in (workdir / "checkpoints").glob("*"))
  return max((int(name) for name in names if name.isdigit()), default=0)


def _log_parameters(
  experiment: Experiment,
  built: BuiltExperiment,
  trainable: int,
  total: int,
  workdir: Folder,
) -> None:
  """Logs how much is trained, on what; parameters.txt gets all parameters."""
  context, note = built.context, ""
  shardings = None
  if context.mesh is not None:
    shardings = context.shardings(built.params)
    each = sharding.bytes_per_device(built.params, shardings)
    note = f"; {context.describe()}, {each:,} bytes of them on each"
    for what in context.undivided(built.params):
      cli.log(f"not sharded: the mesh does not divide {what}")
  used = 1 if context.mesh is None else context.mesh.size
  if (spare := jax.device_count() - used) > 0:
    cli.log(f"{spare} more devices are not used; --set=DATA=-1 takes all")
  artifacts.write_text(
    workdir / "parameters.txt",
    tree.describe(built.params, experiment.trainable, shardings) + "\n",
  )
  cli.log(
    f"{trainable:,} of {total:,} parameters are trained "
    f"({trainable / total:.2%}){note}; {workdir}/parameters.txt lists them"
  )


def _untrained(
  experiment: Experiment, built: BuiltExperiment, trained: state.TrainState
) -> state.TrainState:
  """Returns the state before the first step, from the weights it began with."""
  first, rest = tree.partition(built.params, experiment.trainable)
  first = jax.tree.map(
    lambda x, y: jnp.asarray(x, y.dtype), first, trained.trainable
  )
  transformed = None
  if experiment.transformed is not None:
    transformed, _ = tree.partition(rest, experiment.transformed)
  return dataclasses.replace(trained, trainable=first, transformed=transformed)


def _seconds_to_first_step(
  workdir: Folder, outcome: loop.Outcome
) -> float | None:
  """Returns seconds from `train`'s `started_at` to the end of the first step.

  None where this process resumed a run and so did not take it.
  """
  records = metrics.read_jsonl(workdir / "metrics.jsonl")
  first = next((r for r in records if "train/seconds" in r), None)
  if first is None or outcome.start:
    return None
  parts = ("init", "restore", "compile")
  before = sum(outcome.seconds[part] for part in parts)
  return before + first["train/seconds"]


def _sample_and_evaluate(
  experiment: Experiment,
  built: BuiltExperiment,
  measure: Any,
  trained: state.TrainState,
  heldout: Any,
  when: str,
) -> dict[str, float] | None:
  """Logs a continuation of the prompt, and the held-out perplexity.

  Returns:
    Means over the held-out data, or None where nothing is held out.
  """
  # Generation is token by token, too slow for several processes in step.
  if experiment.prompt is not None and jax.process_count() == 1:
    tokenizer = built.loaded.tokenizer
    made = generate.generate(
      built.loaded.model,
      trained.params,
      [tokenizer.prompt(experiment.prompt)],
      max_new_tokens=experiment.continuation,
    )
    text = tokenizer.decode(made.tokens[0])
    cli.log(f"{when}: {experiment.prompt}{text}\n")
  if heldout is None:
    return None
  found = evaluating.evaluate(measure, trained, heldout, built.context.batch)
  cli.log(f"{when}: held-out perplexity {perplexity(found['loss']):.3f}")
  return found


def perplexity(loss: float) -> float:
  """Returns exp of a loss, infinite where that overflows: of a broken model."""
  try:
    return math.exp(loss)
  except OverflowError:
    return math.inf
