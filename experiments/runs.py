"""Running an experiment: train it, evaluate it. No flags, no gin.

Commands and notebooks call these with an `Experiment` value.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments import cli, corpora, runtime, site
from experiments.experiment import Built, Experiment
from research import sharding, tree
from research.interop import convert, load, sources
from research.interop.load import Loaded
from research.lora import peft_write, wrap
from research.nn import generate
from research.training import (
  checkpoint,
  evaluating,
  folders,
  loop,
  metrics,
  plots,
  state,
)
from research.training.folders import Folder
from research.typing import UserError

DEFAULT_WINDOW = 1024
"""Tokens that `experiments.perplexity` reads together."""


def train(
  experiment: Experiment, workdir: Folder, writers: Sequence[Any] = ()
) -> dict[str, Any]:
  """Trains `experiment` in `workdir`; returns its result.

  Of several processes, each calls this; the first one writes.

  Raises:
    Preempted: SIGTERM came; the run is saved.
    UserError: what the user can mend.
  """
  with site.entered(experiment.mesh) as where:
    return _train(experiment, where, workdir, writers)


def _train(
  experiment: Experiment,
  where: site.Site,
  workdir: Folder,
  writers: Sequence[Any],
) -> dict[str, Any]:
  begin = time.perf_counter()

  # --- model ---
  _say(f"loading {experiment.model}")
  built = experiment.build(where)
  where, tokenizer = built.site, built.loaded.tokenizer
  start = state.create(
    built.params,
    experiment.trainable,
    experiment.optimizer,
    held=experiment.held,
    shardings=where.placement,
  )
  trainable, total = tree.count(start.trainable), tree.count(start.params)
  _say_parameters(experiment, built, trainable, total, workdir)

  # --- data ---
  texts = runtime.in_turn(lambda: corpora.claim(experiment, workdir))
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
    rewrites=experiment.rewrites,
    sharding=where.batch,
    began=runtime.START,
  )

  # --- before and after ---
  # Both now: nobody waits for the first step, and the program is compiled once.
  measure = evaluating.compiled(built.objective, where.batch)
  before, after = (
    _look(experiment, built, measure, trained, heldout, when)
    for when, trained in (
      ("before", _untrained(experiment, built, outcome.state)),
      ("after", outcome.state),
    )
  )
  points = [
    (at, found["loss"], f"held out, {when}")
    for at, found, when in (
      (0, before, "before"),
      (experiment.plan.steps, after, "after"),
    )
    if found is not None
  ]
  with folders.locally(workdir) as place:
    if runtime.first():
      plots.loss_curve(
        workdir / "metrics.jsonl",
        place / "loss.png",
        title=f"{workdir.name}: {trainable:,} trainable of {total:,}",
        points=points,
      )
    params = experiment.finished(outcome.state.params)
    usable = _save_adapter(
      place / "adapter", experiment, built, params
    ) or _save_model(place / "model", experiment, built, params)
  result = {
    "perplexity_before": before and math.exp(before["loss"]),
    "perplexity_after": after and math.exp(after["loss"]),
    "bits_per_byte": corpora.bits_per_byte(experiment, tokenizer, after),
    "trainable_parameters": trainable,
    "total_parameters": total,
    "tokens_per_s": outcome.tokens_per_s,
    "peak_memory_bytes": outcome.peak_memory_bytes,
    "seconds": time.perf_counter() - begin,
    "seconds_to_first_step": _first_step(workdir, outcome),
    "seconds_by_part": outcome.seconds,
    "goodput": outcome.goodput["goodput/fraction"],
    "devices": 1 if where.mesh is None else where.mesh.size,
    "processes": jax.process_count(),
    "steps": experiment.plan.steps,
    "best": outcome.best,
    "texts": texts,
    **outcome.evaluation,
    "workdir": str(workdir),
  }
  _write(workdir / "result.json", json.dumps(result, indent=2) + "\n")
  _say(_next(workdir, built.loaded if usable else None, result["devices"]))
  return result


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
  trained = state.create(
    built.params,
    experiment.trainable,
    experiment.optimizer,
    held=experiment.held,
    shardings=where.placement,
  )
  at = 0
  if workdir is not None:
    folder = workdir / "checkpoints"
    if not folder.is_dir():
      raise UserError(f"{workdir}: no checkpoints/ in it; is it a run's?")
    with checkpoint.Checkpoints(
      folder, best=experiment.plan.best, better=experiment.plan.better
    ) as kept:
      best = kept.best[0] if kept.best else kept.latest
      at = best if number is None else number
      trained = kept.restore(trained, step=at)
  evaluations = experiment.evaluations(built.loaded.tokenizer)
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
  return {"step": at, **found, "bits_per_byte": bits}


def _say(text: str) -> None:
  if runtime.first():
    cli.say(text)


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
      _say(f"not cut, since the mesh does not divide it: {what}")
  used = 1 if where.mesh is None else where.mesh.size
  if (spare := jax.device_count() - used) > 0:
    _say(f"{spare} more devices are not used; --set=DATA=-1 takes all")
  _write(
    workdir / "parameters.txt",
    tree.describe(built.params, experiment.trainable, shardings) + "\n",
  )
  _say(
    f"{trainable:,} of {total:,} parameters are trained "
    f"({trainable / total:.2%}){note}; each one is in {workdir}/parameters.txt"
  )


def _write(path: Folder, text: str) -> None:
  if runtime.first():
    with folders.writing(path):
      folders.write_text(path, text)


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
      [tokenizer.encode(experiment.prompt)],
      max_new_tokens=experiment.continuation,
    )
    text = tokenizer.decode(made.tokens[0])
    _say(f"{when}: {experiment.prompt}{text}\n")
  if heldout is None:
    return None
  found = evaluating.evaluate(measure, trained, heldout, built.site.batch)
  _say(f"{when}: held-out perplexity {math.exp(found['loss']):.3f}")
  return found


def _save_adapter(folder, experiment, built, params) -> bool:
  """Writes what was trained in PEFT's format, if that is adapters."""
  adapters, rest = tree.partition(params, wrap.TRAINABLE)
  if not tree.count(adapters):
    return False
  params = tree.combine(site.whole(adapters), rest)
  if not runtime.first():
    return True
  base = getattr(experiment.model, "name", "unknown")
  if pathlib.Path(base).exists():
    base = str(load.locate(base).resolve())  # of a run, the model in it
  peft_write.save_adapter(folder, params, built.loaded.model, base)
  return True


def _save_model(folder, experiment, built, params) -> bool:
  """Writes the whole model: in Hugging Face's format, if that can say it.

  What `after` made of it is kept as it is, in ours.
  """
  params = site.whole(params)
  if not runtime.first():
    return True
  source = sources.trained(
    built.loaded,
    params,
    {"format": "run", "path": str(folder.parent)},
    getattr(experiment.model, "name", None),
  )
  shutil.rmtree(folder, ignore_errors=True)
  try:
    write = convert.to_orbax if experiment.after else convert.to_hf
    write(source, folder)
  except UserError as error:
    _say(f"{folder}: not written: {error}")
    return False
  return True


def _next(workdir: Folder, usable: Loaded | None, devices: int) -> str:
  """Returns commands to try next, for the Python that runs this one."""
  python = os.path.relpath(sys.executable)
  if python.startswith(".."):
    python = sys.executable
  where = str(workdir)
  if not folders.is_remote(workdir):
    near = os.path.relpath(workdir)
    where = where if near.startswith("..") else near
  # The run's mesh takes as many: a CPU has them only if asked.
  virtual = devices > 1 and jax.default_backend() == "cpu"
  many = f" --devices={devices}" if virtual else ""
  lines = [f"{python} -m experiments.evaluate --workdir={where}{many}"]
  if usable is not None and usable.tokenizer is not None:
    context = usable.model.max_positions or DEFAULT_WINDOW
    window = f" --window={context}" if context < DEFAULT_WINDOW else ""
    lines = [
      f"{python} -m experiments.generate --model={where} "
      '--prompt="A Python decorator is"',
      f"{python} -m experiments.perplexity --model={where} --text=README.md"
      f"{window}",
      *lines,
    ]
  return f"picture: {where}/loss.png. To try next:\n  " + "\n  ".join(lines)
