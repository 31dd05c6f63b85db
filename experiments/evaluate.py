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

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import cli, runtime

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

  if _CONFIG.value is None and _WORKDIR.value is None:
    raise UserError("give --workdir=DIR of a run, or --config=FILE")
  runtime.setup()
  from experiments import config, runs

  path, workdir = _CONFIG.value, None
  if _WORKDIR.value is not None:
    workdir = pathlib.Path(_WORKDIR.value)
    if path is None and not (workdir / "config.gin").is_file():
      raise UserError(
        f"--workdir={workdir}: found no config.gin there, expected the "
        "directory of a run of experiments.train"
      )
    path = path or str(workdir / "config.gin")
  experiment, _ = config.read(path, _SET.value)
  with runtime.cluster(cli.cluster(FLAGS), preemptible=False):
    result = runs.evaluate(experiment, workdir, _STEP.value)
    return result if runtime.first() else None


if __name__ == "__main__":
  cli.run(main)
