"""Evaluates a run, the model that a configuration starts from, or two models.

  python -m experiments.evaluate --workdir=DIR
  python -m experiments.evaluate --config=runs/quickstart.gin
  python -m experiments.evaluate --model=DIR --base=smollm2-135m

With --workdir, evaluates the best checkpoint of a run (or that of --step) on
its held-out data. With --config, evaluates the model before training. If the
run evaluates answers to questions (`Experiment.answers`), the result has their
accuracy and that of baselines: black images, other images, rules.

With --model and --base, compares a model with, for example, the one it was
quantized from: the perplexity of both, their KL divergence with its standard
error, agreement on the most likely token, bits per weight, size, and the error
of each matrix.
"""

if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

from collections.abc import Sequence
from typing import Any

from experiments.core import cli, runtime
from experiments.core.definers import definers
from research.errors import UserError

FLAGS = cli.new_flags(cluster=True)
define = definers(FLAGS)

_CONFIG = define.text(
  "config", "Gin file; by default the working directory's config.gin."
)
_WORKDIR = define.text("workdir", "A run's working directory.")
_STEP = define.integer(
  "step", "Step of the checkpoint; by default the best one, else the last."
)
_MODEL = define.text("model", f"With --base: {cli.MODEL}")
_BASE = define.text("base", "The model that --model is compared with.")
_TEXT = define.text(
  "text",
  "With --base: a text file in UTF-8; by default held-out topics of the Python "
  "reference.",
)
_WINDOW = define.integer(
  "window",
  "With --base: tokens read together, at most the model's context.",
  default=512,
)
_MAX_WINDOWS = define.integer(
  "max_windows", "With --base: how many windows at most; 0 for all.", default=8
)
_LAYERS = define.switch(
  "layers", "With --base: measure each matrix.", default=True
)
_SET = cli.define_set(FLAGS, "EVAL_BATCHES=4")
_OF_COMPARISONS = ("text", "window", "max_windows", "layers")


def main(argv: Sequence[str]) -> dict[str, Any] | None:
  """Evaluates; returns the metrics, which the first process prints as JSON."""
  del argv
  cli.directory(workdir=_WORKDIR.value)
  if _MODEL.value is not None or _BASE.value is not None:
    own = ("config", "workdir", "step", "set", *cli.CLUSTER)
    cli.exclusive("with --base", FLAGS, *own)
    return _compare_models()
  cli.exclusive("without --base", FLAGS, *_OF_COMPARISONS)
  if _WORKDIR.value is None:
    cli.exclusive("without --workdir", FLAGS, "step")
  if _CONFIG.value is None and _WORKDIR.value is None:
    raise UserError(
      "found none of --workdir, --config and --model; expected --workdir=DIR of"
      " a run, --config=FILE, or --model=DIR and --base=DIR to compare models"
    )
  return _evaluate_run()


def _evaluate_run() -> dict[str, Any] | None:
  """Returns the metrics of a run, or of a configuration's untrained model."""
  cli.run_file(
    _CONFIG.value,
    _SET.value,
    unneeded=r"experiment\.Experiment\.data",
    workdir=_WORKDIR.value,
  )
  runtime.setup()
  from experiments.core import config, train_eval
  from experiments.stages import staged

  if _CONFIG.value is None:
    read = config.read_workdir(_WORKDIR.value, _SET.value)
  else:
    read = config.read(_CONFIG.value, _SET.value)
  experiment, workdir = staged.open_run(read.experiment, _WORKDIR.value)
  with runtime.cluster(cli.cluster(FLAGS), preemptible=False):
    result = train_eval.evaluate(experiment, workdir, _STEP.value)
    return result if runtime.is_first_process() else None


def _compare_models() -> dict[str, Any]:
  """Returns how --model differs from --base."""
  cli.required(model=_MODEL.value, base=_BASE.value)
  cli.model(_MODEL.value)
  cli.model(_BASE.value)
  text = None if _TEXT.value is None else cli.read_text(_TEXT.value, "text")
  runtime.setup()
  from experiments.quantizing import base_comparison

  return base_comparison.compare_with_base(
    _MODEL.value,
    _BASE.value,
    text,
    _WINDOW.value,
    _MAX_WINDOWS.value or None,
    layers=_LAYERS.value,
  )


if __name__ == "__main__":
  cli.run(main)
