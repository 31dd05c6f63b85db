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
  from research.training import folders

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


if __name__ == "__main__":
  cli.run(main)
