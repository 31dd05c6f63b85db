"""Runs or resumes an experiment.

  python -m experiments.train --config=runs/quickstart.gin --workdir=DIR

Trains the model of the configuration and writes to the working directory:
config.gin (reproduces the run), metrics.jsonl, checkpoints/, loss.png, adapter/
(in PEFT's format) or model/ (both where transforms changed the adapters' base),
and result.json, whose content is the last line on stdout. SIGTERM or Ctrl-C
saves a checkpoint and exits with status 42 (a second Ctrl-C exits at once); the
same command then resumes the run. For a finished run the command prints the
result and changes nothing. To resume, --config may be left out; with more STEPS
a finished run is continued:

  python -m experiments.train --workdir=DIR [--set=STEPS=200]

Your own data: --config=runs/data/chat.gin --set=FILES=chat.jsonl (also text,
completions, preferences, images). Another model: --set=MODEL=NAME there, else
--set=experiment.Pretrained.name=NAME.

Macros of configs/base.gin set the device mesh; to try it on a CPU:

  python -m experiments.train --config=... --workdir=D --devices=8 --set=FSDP=8
"""

if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare(resumes=True)

import contextlib
from collections.abc import Sequence
from typing import Any

from experiments.core import cli, runtime
from experiments.core.definers import definers

FLAGS = cli.new_flags(cluster=True)
define = definers(FLAGS)

_CONFIG = cli.define_config(FLAGS, default="the workdir's own, to resume it")
_WORKDIR = define.text(
  "workdir",
  "The run's working directory; created if missing, else the run is resumed.",
)
_SET = cli.define_set(FLAGS)
_TENSORBOARD = define.switch(
  "tensorboard",
  "Also write TensorBoard events; needs pip install -e '.[tracking]'.",
)
_WANDB = define.switch(
  "wandb", "Also log to Weights & Biases; needs pip install -e '.[tracking]'."
)


def main(argv: Sequence[str]) -> dict[str, Any] | None:
  """Trains; returns the result, which the first process prints as JSON."""
  del argv
  cli.required(workdir=_WORKDIR.value)
  cli.directory(workdir=_WORKDIR.value)
  fix = "; --config=FILE starts one there"
  cli.run_file(
    _CONFIG.value or None, _SET.value, workdir=_WORKDIR.value, fix=fix
  )
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
    read = config.read_workdir(_WORKDIR.value, _SET.value)
  with (
    runtime.cluster(cli.cluster(FLAGS)),
    contextlib.ExitStack() as stack,
  ):
    workdir = runtime.first_process_first(
      lambda: running.claim(
        read.experiment,
        read.text,
        _WORKDIR.value,
        LENGTH_AND_MESH_LINES,
        stack,
      )
    )
    result = running.train(read.experiment, workdir, writers, runtime.START)
    return result if runtime.is_first_process() else None


if __name__ == "__main__":
  cli.run(main)
