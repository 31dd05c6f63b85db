"""Runs or resumes an experiment.

  python -m experiments.train --config=runs/quickstart.gin --workdir=DIR

Trains what the configuration describes and leaves in the working directory:
config.gin (rebuilds the run), metrics.jsonl, checkpoints/, loss.png, adapter/
(PEFT's format, where the run trained one) and result.json, whose content is
the last line on stdout. The same command again resumes; so it does after
SIGTERM or Ctrl-C, upon which the run saves and ends with status 42 (a second
Ctrl-C ends it at once). Of a finished run it prints the result, and changes
nothing.

A mesh is a matter of five numbers (configs/base.gin); on virtual devices:

  python -m experiments.train --config=... --workdir=D --devices=8 --set=FSDP=8
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

MAY_DIFFER = (
  r"(?i)^steps =|\b(plan|optim\.\w+)\.steps ="
  r"|\bmesh = @|\bsharding\b"
  r"|^(data|fsdp|sequence|ring|ulysses|tensor|expert) ="
)
"""In which lines of its configuration a run that goes on may differ: how long
it is, and over which devices it goes."""

_CONFIG = flags.DEFINE_string(
  "config",
  None,
  "Gin file, here or under configs/, e.g. runs/quickstart.gin.",
  flag_values=FLAGS,
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Where the run leaves everything; resumed if it exists.",
  flag_values=FLAGS,
)
_SET = flags.DEFINE_multi_string(
  "set",
  [],
  "Gin binding that wins over the file's, e.g. --set=STEPS=20.",
  flag_values=FLAGS,
)
_TENSORBOARD = flags.DEFINE_bool(
  "tensorboard",
  False,
  "Also write TensorBoard events (needs tensorboardX).",
  flag_values=FLAGS,
)
_WANDB = flags.DEFINE_bool(
  "wandb",
  False,
  "Also write to Weights & Biases (needs wandb).",
  flag_values=FLAGS,
)


def main(argv: Sequence[str]) -> dict[str, Any] | None:
  """Trains; returns the result, which the first process prints as JSON."""
  del argv
  cli.required(config=_CONFIG.value, workdir=_WORKDIR.value)
  runtime.setup()
  from experiments.core import config, runs
  from research.training.checkpoints import workdir as workdirs
  from research.training.reports import metrics

  writers = [metrics.TensorBoardWriter] * _TENSORBOARD.value
  writers += [metrics.WandbWriter] * _WANDB.value
  experiment, text = config.read(_CONFIG.value, _SET.value)
  with runtime.cluster(cli.cluster(FLAGS)):
    claim = (_WORKDIR.value, text, MAY_DIFFER)

    def claimed():
      folder = workdirs.check_workdir(*claim)
      if runs.finished(experiment, folder) is None:
        workdirs.claim_workdir(*claim)
      return folder

    workdir = runtime.in_turn(claimed)
    result = runs.train(experiment, workdir, writers)
    return result if runtime.first() else None


if __name__ == "__main__":
  cli.run(main)
