"""Evaluates a run, the model that a configuration starts from, or two models.

  python -m experiments.evaluate --workdir=DIR
  python -m experiments.evaluate --config=runs/quickstart.gin
  python -m experiments.evaluate --model=DIR --base=smollm2-135m

With a working directory, its own configuration and its best checkpoint (or
`--step`'s) are used; without, the untrained model of `--config`. A model beside
its base, such as one that was quantized: perplexity of both, divergence with
its standard error, tokens whose most likely one is the same, true bits a
weight, size, and errors of each matrix.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.core import cli, runtime

FLAGS = cli.new_flags(cluster=True)

_CONFIG = flags.DEFINE_string(
  "config",
  None,
  "Gin file; by default the working directory's config.gin.",
  flag_values=FLAGS,
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "A run's working directory.", flag_values=FLAGS
)
_STEP = flags.DEFINE_integer(
  "step",
  None,
  "Which checkpoint; by default the best, else the last.",
  flag_values=FLAGS,
)
_MODEL = flags.DEFINE_string(
  "model", None, f"With --base: {cli.MODEL}", flag_values=FLAGS
)
_BASE = flags.DEFINE_string(
  "base", None, "What --model is compared with.", flag_values=FLAGS
)
_TEXT = flags.DEFINE_string(
  "text",
  None,
  "With --base: a text file in UTF-8; by default held-out topics of the Python "
  "reference.",
  flag_values=FLAGS,
)
_WINDOW = flags.DEFINE_integer(
  "window", 512, "With --base: tokens read together.", flag_values=FLAGS
)
_MAX_WINDOWS = flags.DEFINE_integer(
  "max_windows",
  8,
  "With --base: how many windows at most; 0 for all.",
  flag_values=FLAGS,
)
_LAYERS = flags.DEFINE_bool(
  "layers", True, "With --base: measure each matrix.", flag_values=FLAGS
)
_SET = flags.DEFINE_multi_string(
  "set",
  [],
  "Gin binding that wins over the file's.",
  flag_values=FLAGS,
)


def main(argv: Sequence[str]) -> dict[str, Any] | None:
  """Evaluates; returns the metrics, which the first process prints as JSON."""
  del argv
  from research.typing import UserError

  if _MODEL.value is not None or _BASE.value is not None:
    return _beside()
  if _CONFIG.value is None and _WORKDIR.value is None:
    raise UserError(
      "give --workdir=DIR of a run, or --config=FILE; or --model= and --base="
    )
  runtime.setup()
  from experiments.core import config, runs
  from research.io import folders

  path, workdir, mark = _CONFIG.value, None, None
  if _WORKDIR.value is not None:
    workdir = folders.folder(_WORKDIR.value)
    mark = workdir / "config.gin"
    if path is None and not mark.exists():
      raise UserError(
        f"--workdir={_WORKDIR.value}: found no config.gin there, expected the "
        "directory of a run of experiments.train"
      )
  if path is None:
    found = config.parse(mark.read_text("utf-8"), _SET.value, str(mark))
  else:
    found = config.read(path, _SET.value)
  with runtime.cluster(cli.cluster(FLAGS), preemptible=False):
    result = runs.evaluate(found.experiment, workdir, _STEP.value)
    return result if runtime.first() else None


def _beside() -> dict[str, Any]:
  """Returns how --model differs from --base."""
  cli.required(model=_MODEL.value, base=_BASE.value)
  text = None if _TEXT.value is None else cli.read_text(_TEXT.value, "text")
  runtime.setup()
  from experiments.studies.quant import quantized

  return quantized.beside(
    _MODEL.value,
    _BASE.value,
    text,
    _WINDOW.value,
    _MAX_WINDOWS.value or None,
    layers=_LAYERS.value,
  )


if __name__ == "__main__":
  cli.run(main)
