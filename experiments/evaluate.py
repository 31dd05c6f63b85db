"""Evaluates a run, or the model that a configuration starts from.

  python -m experiments.evaluate --workdir=DIR
  python -m experiments.evaluate --config=runs/quickstart.gin

With a working directory, its own configuration and its best checkpoint (or
`--step`'s) are used; without, the untrained model of `--config`.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments import runtime

  runtime.prepare()

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from experiments import cli, config, runtime
from experiments.experiment import Experiment
from research.training import checkpoint, loop, state, step
from research.typing import UserError

_CONFIG = flags.DEFINE_string(
  "config", None, "Gin file; by default the working directory's config.gin."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "A run's working directory.")
_STEP = flags.DEFINE_integer(
  "step", None, "Which checkpoint; by default the best, else the last."
)
_SET = flags.DEFINE_multi_string(
  "set", [], "Gin binding that wins over the file's."
)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Evaluates; returns the metrics, which the command prints as JSON."""
  del argv
  if _CONFIG.value is None and _WORKDIR.value is None:
    raise UserError("give --workdir=DIR of a run, or --config=FILE")
  runtime.setup()
  path, workdir = _CONFIG.value, None
  if _WORKDIR.value is not None:
    workdir = pathlib.Path(_WORKDIR.value)
    path = path or str(workdir / "config.gin")
  experiment, _ = config.read(path, _SET.value)
  return run(experiment, workdir, _STEP.value)


def run(
  experiment: Experiment,
  workdir: pathlib.Path | None = None,
  number: int | None = None,
) -> dict[str, Any]:
  """Evaluates `experiment` on its validation and held-out data.

  Args:
    experiment: what was, or would be, trained.
    workdir: where its checkpoints are; None for the model before training.
    number: step of the checkpoint; None for the best, or else the last.
  """
  built = experiment.build()
  trained = state.create(
    built.params, experiment.trainable, experiment.optimizer
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
  evaluations = experiment.evaluations(built.loaded.tokenizer.encode)
  if not evaluations:
    raise UserError("this experiment has neither validation nor heldout data")
  measure = jax.jit(step.make_eval_step(built.objective))
  found = loop.evaluate_all(measure, trained, evaluations)
  for name in evaluations:
    found[f"{name}/perplexity"] = math.exp(found[f"{name}/loss"])
  return {"step": at, **found}


if __name__ == "__main__":
  cli.run(main)
