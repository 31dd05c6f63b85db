"""Runs or resumes an experiment.

  python -m experiments.train --config=runs/quickstart.gin --workdir=DIR

Trains what the configuration describes and leaves in the working directory:
config.gin (rebuilds the run), metrics.jsonl, checkpoints/, loss.png, adapter/
(PEFT's format, where the run trained one) and result.json, whose content is
the last line on stdout. The same command again resumes.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments import runtime

  runtime.prepare()

import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from experiments import cli, config, runtime
from experiments.experiment import Built, Experiment
from research import tree
from research.lora import adapt, peft
from research.nn import generate
from research.training import checkpoint, loop, plots, state, step
from research.training.metrics import TensorBoardWriter, WandbWriter

_CONFIG = flags.DEFINE_string(
  "config", None, "Gin file, here or under configs/, e.g. runs/quickstart.gin."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where the run leaves everything; resumed if it exists."
)
_SET = flags.DEFINE_multi_string(
  "set", [], "Gin binding that wins over the file's, e.g. --set=STEPS=20."
)
_TENSORBOARD = flags.DEFINE_bool(
  "tensorboard", False, "Also write TensorBoard events (needs tensorboardX)."
)
_WANDB = flags.DEFINE_bool(
  "wandb", False, "Also write to Weights & Biases (needs wandb)."
)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Trains; returns the result, which the command prints as JSON."""
  del argv
  cli.required(config=_CONFIG.value, workdir=_WORKDIR.value)
  runtime.setup()
  writers = [TensorBoardWriter] * _TENSORBOARD.value
  writers += [WandbWriter] * _WANDB.value
  experiment, text = config.read(_CONFIG.value, _SET.value)
  workdir = checkpoint.claim_workdir(_WORKDIR.value, text)
  return run(experiment, workdir, writers)


def run(
  experiment: Experiment, workdir: pathlib.Path, writers: Sequence[Any] = ()
) -> dict[str, Any]:
  """Trains `experiment` in `workdir`; returns its result."""
  begin = time.perf_counter()

  # --- model ---
  cli.say(f"loading {experiment.model}")
  built = experiment.build()
  encode = built.loaded.tokenizer.encode
  start = state.create(built.params, experiment.trainable, experiment.optimizer)
  trainable, total = tree.count(start.trainable), tree.count(start.params)
  (workdir / "parameters.txt").write_text(
    tree.describe(built.params, experiment.trainable) + "\n"
  )
  cli.say(
    f"{trainable:,} of {total:,} parameters are trained "
    f"({trainable / total:.2%}); each one is in {workdir}/parameters.txt"
  )

  # --- data ---
  training = experiment.data.training(encode)
  evaluations = experiment.evaluations(encode)
  heldout = evaluations.pop("heldout", None)

  # --- before ---
  measure = jax.jit(step.make_eval_step(built.objective))
  before = _perplexity(measure, start, heldout)
  _say_perplexity("before", before)
  _continue(experiment, built, start, "before")

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
  )

  # --- after ---
  after = _perplexity(measure, outcome.state, heldout)
  _say_perplexity("after", after)
  _continue(experiment, built, outcome.state, "after")
  points = [
    (at, math.log(value), f"held out, {when}")
    for at, value, when in (
      (0, before, "before"),
      (experiment.plan.steps, after, "after"),
    )
    if value is not None
  ]
  plots.loss_curve(
    workdir / "metrics.jsonl",
    workdir / "loss.png",
    title=f"{workdir.name}: {trainable:,} trainable of {total:,}",
    points=points,
  )
  adapted = _save_adapter(workdir / "adapter", experiment, built, outcome)
  result = {
    "perplexity_before": before,
    "perplexity_after": after,
    "trainable_parameters": trainable,
    "total_parameters": total,
    "tokens_per_s": outcome.tokens_per_s,
    "peak_memory_bytes": outcome.peak_memory_bytes,
    "seconds": time.perf_counter() - begin,
    "seconds_by_part": outcome.seconds,
    "steps": experiment.plan.steps,
    "best": outcome.best,
    **outcome.evaluation,
    "workdir": str(workdir),
  }
  (workdir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
  cli.say(_next(workdir, adapted))
  return result


def _perplexity(measure, trained, batches) -> float | None:
  if batches is None:
    return None
  return math.exp(loop.evaluate(measure, trained, batches)["loss"])


def _say_perplexity(when: str, value: float | None) -> None:
  if value is not None:
    cli.say(f"held-out perplexity {when}: {value:.3f}")


def _continue(
  experiment: Experiment, built: Built, trained: state.TrainState, when: str
) -> None:
  """Prints what the model makes of the experiment's prompt."""
  if experiment.prompt is None:
    return
  tokenizer = built.loaded.tokenizer
  ids = tokenizer.encode(experiment.prompt)
  made = generate.generate(
    built.loaded.model,
    trained.params,
    [ids],
    max_new_tokens=experiment.continuation,
  )
  cli.say(f"{when}: {experiment.prompt}{tokenizer.decode(made.tokens[0])}\n")


def _save_adapter(folder, experiment, built, outcome) -> bool:
  """Writes what was trained in PEFT's format, if that is adapters."""
  params = outcome.state.params
  adapters, _ = tree.partition(params, adapt.TRAINABLE)
  if not tree.count(adapters):
    return False
  base = getattr(experiment.model, "name", "unknown")
  if pathlib.Path(base).exists():
    base = str(pathlib.Path(base).resolve())
  peft.save_adapter(folder, params, built.loaded.model, base)
  return True


def _next(workdir: pathlib.Path, adapted: bool) -> str:
  model = workdir if adapted else "smollm2-135m"
  return (
    f"picture: {workdir}/loss.png. To try next:\n"
    f"  python -m experiments.generate --model={model} "
    '--prompt="A Python decorator is"\n'
    f"  python -m experiments.perplexity --model={model} --text=README.md\n"
    "  python -m experiments.train --config=runs/quickstart.gin "
    f"--set=RANK=64 --workdir={workdir}_r64"
  )


if __name__ == "__main__":
  cli.run(main)
