"""Runs or resumes an experiment.

  python -m experiments.train --config=runs/quickstart.gin --workdir=DIR

Trains the model of the configuration and writes to the working directory:
config.gin (rebuilds the run), metrics.jsonl, checkpoints/, loss.png, adapter/
(in PEFT's format, if the run trained one) and result.json, whose content is
the last line on stdout. The same command again resumes the run, also after
SIGTERM or Ctrl-C, upon which it saves and exits with status 42 (a second Ctrl-C
ends it at once). For a finished run it prints the result, and changes nothing.
A run that was started needs no --config: its workdir has it.

  python -m experiments.train --workdir=DIR [--set=STEPS=200]

Numbers in configs/base.gin set the mesh; on virtual devices:

  python -m experiments.train --config=... --workdir=D --devices=8 --set=FSDP=8
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare(resumes=True)

from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.core import cli, runtime

FLAGS = cli.new_flags(cluster=True)

_CONFIG = cli.define_config(FLAGS, default="the workdir's own, to resume it")
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "The run's working directory; the run resumes if it exists.",
  flag_values=FLAGS,
)
_SET = cli.define_set(FLAGS)
_TENSORBOARD = flags.DEFINE_bool(
  "tensorboard",
  False,
  "Also write TensorBoard events; pip install -e '.[tracking]' brings what it "
  "takes.",
  flag_values=FLAGS,
)
_WANDB = flags.DEFINE_bool(
  "wandb",
  False,
  "Also write to Weights & Biases; pip install -e '.[tracking]' brings what it "
  "takes.",
  flag_values=FLAGS,
)


def main(argv: Sequence[str]) -> dict[str, Any] | None:
  """Trains; returns the result, which the first process prints as JSON."""
  del argv
  cli.required(workdir=_WORKDIR.value)
  runtime.setup()
  from experiments.core import config
  from experiments.stages import running
  from research.training.checkpoints.workdir import LENGTH_AND_MESH_LINES
  from research.training.reports import metrics

  writers = [metrics.TensorBoardWriter] * _TENSORBOARD.value
  writers += [metrics.WandbWriter] * _WANDB.value
  if _CONFIG.value:
    read = config.read(_CONFIG.value, _SET.value)
  else:
    read = config.read_workdir(
      _WORKDIR.value, _SET.value, "; --config=FILE starts one there"
    )
  with runtime.cluster(cli.cluster(FLAGS)):
    workdir = runtime.first_process_first(
      lambda: running.claim(
        read.experiment, read.text, _WORKDIR.value, LENGTH_AND_MESH_LINES
      )
    )
    result = running.train(read.experiment, workdir, writers)
    return result if runtime.is_first_process() else None


if __name__ == "__main__":
  cli.run(main)
