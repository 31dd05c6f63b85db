"""Running an experiment: train it, evaluate it. No flags, no gin.

Commands and notebooks call these with an `Experiment` value.
"""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.core import corpora, outputs, runtime, site
from experiments.core.experiment import Built, Experiment
from research import sharding, tree, weights
from research.generation import generate
from research.io.folders import Folder
from research.training import evaluating, loop, state
from research.training.checkpoints import checkpoint
from research.training.reports import metrics
from research.typing import UserError


def train(
  experiment: Experiment, workdir: Folder, writers: Sequence[Any] = ()
) -> dict[str, Any]:
  """Trains `experiment` in `workdir`; returns its result.

  Of several processes, each calls this; the first one writes. A run that is
  finished is left as it is.

  Raises:
    Preempted: it was asked to end (`training.preemption`), and is saved.
    UserError: what the user can mend.
  """
  old = runtime.in_turn(lambda: finished(experiment, workdir))
  if old is not None:
    outputs.say(
      f"{workdir}: finished, after {old['steps']} steps; this is its result. "
      "More of them (--set=STEPS=...)\ngo on from there; without result.json, "
      "what the run leaves behind is written anew."
    )
    return old
  with site.entered(experiment.mesh) as where:
    return _train(experiment, where, workdir, writers)


def finished(experiment: Experiment, workdir: Folder) -> dict[str, Any] | None:
  """Returns the result of a run that has nothing left to do, else None."""
  try:
    old = json.loads((workdir / "result.json").read_text("utf-8"))
  except (FileNotFoundError, ValueError):
    return None
  steps = old.get("steps") if isinstance(old, dict) else None
  if type(steps) is not int or steps < experiment.plan.steps:
    return None
  # It was written last; but a workdir may have lost what it is about.
  return old if (workdir / "checkpoints" / str(steps)).is_dir() else None


def _train(
  experiment: Experiment,
  where: site.Site,
  workdir: Folder,
  writers: Sequence[Any],
) -> dict[str, Any]:
  begin = time.perf_counter()

  # --- model ---
  outputs.say(f"loading {experiment.model}")
  built = experiment.build(where)
  where = built.site
  start = _start(experiment, built)
  trainable, total = map(weights.count, (start.trainable, start.params))
  _say_parameters(experiment, built, trainable, total, workdir)

  # --- data ---
  tokenizer = runtime.in_turn(
    lambda: corpora.as_trained(
      experiment, built.loaded.tokenizer, workdir, keep=True
    )
  )
  built = built.reading(tokenizer)
  texts = runtime.in_turn(lambda: corpora.claim(experiment, workdir))
  corpora.check_context(experiment, built.loaded.model, tokenizer)
  training = experiment.data.training(tokenizer, *where.share)
  evaluations = experiment.evaluations(tokenizer)
  heldout = evaluations.pop("heldout", None)

  # --- train ---
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
    state_transforms=experiment.rewrites,
    sharding=where.batch,
    started_at=runtime.START,
  )

  # --- what became of it ---
  looks = _looks(experiment, built, outcome.state, heldout)
  (_, before), (_, after) = looks.values()
  title = f"{workdir.name}: {trainable:,} trainable of {total:,}"
  readable = outputs.keep(
    experiment, built, outcome.state, workdir, looks, title
  )
  result = {
    "perplexity_before": before and math.exp(before["loss"]),
    "perplexity_after": after and math.exp(after["loss"]),
    "bits_per_byte": corpora.bits_per_byte(experiment, tokenizer, after),
    "trainable_parameters": trainable,
    "total_parameters": total,
    "seconds": time.perf_counter() - begin,
    **_told(workdir, outcome),
    "devices": 1 if where.mesh is None else where.mesh.size,
    "processes": jax.process_count(),
    "steps": experiment.plan.steps,
    "texts": texts,
    "special_tokens": corpora.described(tokenizer),
    **(outcome.evaluation or _evaluated(experiment, workdir)),
    "workdir": str(workdir),
  }
  outputs.write(workdir / "result.json", json.dumps(result, indent=2) + "\n")
  loaded = built.loaded if readable else None
  outputs.say(outputs.commands(workdir, loaded, result["devices"]))
  return result


def _looks(
  experiment: Experiment,
  built: Built,
  trained: state.TrainState,
  heldout: Any,
) -> dict[str, tuple[int, Any]]:
  """Returns (step, metrics of the held-out text) before and after training.

  Both now: nobody waits for the first step, and the program is compiled once.
  """
  measure = evaluating.compiled(built.objective, built.site.batch)
  before, after = (
    _look(experiment, built, measure, each, heldout, when)
    for when, each in (
      ("before", _untrained(experiment, built, trained)),
      ("after", trained),
    )
  )
  return {"before": (0, before), "after": (experiment.plan.steps, after)}


def _evaluated(experiment: Experiment, workdir: Folder) -> dict[str, float]:
  """Returns the last step's evaluation, of the process that took it."""
  found: dict[str, float] = {}
  for record in metrics.read_jsonl(workdir / "metrics.jsonl"):
    if record["step"] == experiment.plan.steps:
      named = {k: v for k, v in record.items() if k.startswith("validation/")}
      found |= named
  return found


def _told(workdir: Folder, outcome: loop.Outcome) -> dict[str, Any]:
  """Returns what a result says of how the loop went."""
  return {
    "tokens_per_s": outcome.tokens_per_s,
    "peak_memory_bytes": outcome.peak_memory_bytes,
    "seconds_to_first_step": _first_step(workdir, outcome),
    "seconds_by_part": outcome.seconds,
    "goodput": outcome.goodput["goodput/fraction"],
    "best": outcome.best,
  }


def evaluate(
  experiment: Experiment,
  workdir: Folder | None = None,
  number: int | None = None,
) -> dict[str, Any]:
  """Evaluates `experiment` on its validation and held-out data.

  Args:
    experiment: what was, or would be, trained.
    workdir: where its checkpoints are; None for the model before training.
    number: step of the checkpoint; None for the best, or else the last.
  """
  with site.entered(experiment.mesh) as where:
    return _evaluate(experiment, where, workdir, number)


def _evaluate(experiment, where, workdir, number) -> dict[str, Any]:
  built = experiment.build(where)
  where = built.site
  if workdir is None:
    at, trained = 0, _start(experiment, built)
  else:
    words = built.loaded.tokenizer
    built = built.reading(corpora.as_trained(experiment, words, workdir))
    at, trained = restored(experiment, built, workdir, number)
  words = built.loaded.tokenizer
  corpora.check_context(experiment, built.loaded.model, words)
  evaluations = experiment.evaluations(words)
  if not evaluations:
    raise UserError("this experiment has neither validation nor heldout data")
  measure = evaluating.compiled(built.objective, where.batch)
  found = evaluating.evaluate_all(measure, trained, evaluations, where.batch)
  for name in evaluations:
    found[f"{name}/perplexity"] = math.exp(found[f"{name}/loss"])
  heldout = {
    name.removeprefix("heldout/"): value
    for name, value in found.items()
    if name.startswith("heldout/")
  }
  bits = corpora.bits_per_byte(
    experiment, built.loaded.tokenizer, heldout or None
  )
  around = corpora.described(built.loaded.tokenizer)
  return {"step": at, **found, "bits_per_byte": bits, "special_tokens": around}


def _start(experiment: Experiment, built: Built) -> state.TrainState:
  """Returns the state before the first step."""
  return state.create(
    built.params,
    experiment.trainable,
    experiment.optimizer,
    held=experiment.held,
    shardings=built.site.placement,
  )


def restored(
  experiment: Experiment,
  built: Built,
  workdir: Folder,
  number: int | None = None,
) -> tuple[int, state.TrainState]:
  """Returns (step, state) of a checkpoint of a run.

  Args:
    experiment: of the run.
    built: what it builds.
    workdir: where its checkpoints are.
    number: step of the checkpoint; None for the best, or else the last.
  """
  folder = workdir / "checkpoints"
  if not folder.is_dir():
    raise UserError(f"{workdir}: no checkpoints/ in it; has the run begun?")
  with checkpoint.Checkpoints(
    folder, best=experiment.plan.best, better=experiment.plan.better
  ) as kept:
    best = kept.best[0] if kept.best else kept.latest
    at = best if number is None else number
    return at, kept.restore(_start(experiment, built), step=at)


def _say_parameters(
  experiment: Experiment,
  built: Built,
  trainable: int,
  total: int,
  workdir: Folder,
) -> None:
  """Says what is trained and where; the table of it all goes to a file."""
  where, note = built.site, ""
  shardings = None
  if where.mesh is not None:
    shardings = where.shardings(built.params)
    each = sharding.bytes_per_device(built.params, shardings)
    note = f"; {where.describe()}, {each:,} bytes of them on each"
    for what in where.uncut(built.params):
      outputs.say(f"not cut, since the mesh does not divide it: {what}")
  used = 1 if where.mesh is None else where.mesh.size
  if (spare := jax.device_count() - used) > 0:
    outputs.say(f"{spare} more devices are not used; --set=DATA=-1 takes all")
  outputs.write(
    workdir / "parameters.txt",
    tree.describe(built.params, experiment.trainable, shardings) + "\n",
  )
  outputs.say(
    f"{trainable:,} of {total:,} parameters are trained "
    f"({trainable / total:.2%}){note}; each one is in {workdir}/parameters.txt"
  )


def _untrained(
  experiment: Experiment, built: Built, trained: state.TrainState
) -> state.TrainState:
  """Returns the state before the first step; its weights were only copied."""
  first, rest = tree.partition(built.params, experiment.trainable)
  first = jax.tree.map(
    lambda x, y: jnp.asarray(x, y.dtype), first, trained.trainable
  )
  held = None
  if experiment.held is not None:
    held, _ = tree.partition(rest, experiment.held)
  return dataclasses.replace(trained, trainable=first, held=held)


def _first_step(workdir: Folder, outcome: loop.Outcome) -> float | None:
  """Returns seconds from the command to the end of the first step.

  None where this process resumed a run and so did not take it.
  """
  records = metrics.read_jsonl(workdir / "metrics.jsonl")
  first = next((r for r in records if "train/seconds" in r), None)
  if first is None or outcome.start:
    return None
  parts = ("init", "restore", "compile")
  before = sum(outcome.seconds[part] for part in parts)
  return before + first["train/seconds"]


def _look(
  experiment: Experiment,
  built: Built,
  measure: Any,
  trained: state.TrainState,
  heldout: Any,
  when: str,
) -> dict[str, float] | None:
  """Says what the model makes of the prompt and of held-out text.

  Returns:
    Means over the held-out data, or None where nothing is held out.
  """
  # Tokens come out one by one: that is for one process to wait for.
  if experiment.prompt is not None and jax.process_count() == 1:
    tokenizer = built.loaded.tokenizer
    made = generate.generate(
      built.loaded.model,
      trained.params,
      [tokenizer.prompt(experiment.prompt)],
      max_new_tokens=experiment.continuation,
    )
    text = tokenizer.decode(made.tokens[0])
    outputs.say(f"{when}: {experiment.prompt}{text}\n")
  if heldout is None:
    return None
  found = evaluating.evaluate(measure, trained, heldout, built.site.batch)
  outputs.say(f"{when}: held-out perplexity {math.exp(found['loss']):.3f}")
  return found
