"""Says what an experiment needs and takes on devices that are not here.

  python -m experiments.plan --config=runs/quickstart.gin --topology=v5e:4x4

Compiles the experiment's own training step, sharded by its own mesh, for a
slice of a TPU pod (needs the package libtpu, no TPU) or for virtual devices of
this machine (--topology=cpu:8), from shapes alone: no weight is read. Prints
how every parameter is cut, the memory of a device, FLOPs, collectives and
bounds of the time of a step; the last line on stdout is a JSON object.

Of a model that fills in masks, sampling's two kinds of calls, with a cache:

  python -m experiments.plan --config=runs/llada/pretrain_8b.gin \\
    --set=FSDP=1 --set=TENSOR=4 --topology=v5p:2x2x1 --fill=16x1024+256
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.core import cli

FLAGS = cli.new_flags()

_CONFIG = flags.DEFINE_string(
  "config",
  None,
  "Gin file, here or under configs/, e.g. runs/quickstart.gin.",
  flag_values=FLAGS,
)
_TOPOLOGY = flags.DEFINE_string(
  "topology",
  None,
  "A slice of a TPU pod, e.g. v5e:4x4, v5p:2x2x4 or v6e:16x16; or virtual "
  "devices of this machine, e.g. cpu:8.",
  flag_values=FLAGS,
)
_SET = flags.DEFINE_multi_string(
  "set",
  [],
  "Gin binding that wins over the file's, e.g. --set=BATCH=64.",
  flag_values=FLAGS,
)
_HLO = flags.DEFINE_string(
  "hlo",
  None,
  "File to write the compiled program to, as XLA's text.",
  flag_values=FLAGS,
)
_FILL = flags.DEFINE_string(
  "fill",
  None,
  "ROWSxPROMPT+LENGTH: plan the calls that fill so many masks after prompts, "
  "instead of training.",
  flag_values=FLAGS,
)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Plans; returns the result, which the command prints as JSON."""
  del argv
  cli.required(config=_CONFIG.value, topology=_TOPOLOGY.value)
  import jax

  # What is here is not asked, and stays free for others.
  jax.config.update("jax_platforms", "cpu")
  from experiments.core import config
  from experiments.planning import ahead, ahead_filling
  from research.planning import chips

  experiment, _ = config.read(_CONFIG.value, _SET.value)
  wanted = _FILL.value and ahead_filling.rows(_FILL.value)
  topology = chips.topology(_TOPOLOGY.value)
  if wanted:
    return ahead_filling.plan(experiment, topology, wanted)
  return ahead.plan(experiment, topology, hlo=_HLO.value)


if __name__ == "__main__":
  cli.run(main)
