"""Plans an experiment on devices that this machine does not have.

  python -m experiments.plan --config=runs/quickstart.gin --topology=v5e:4x4

Compiles the experiment's own training step, sharded over its own mesh, for a
slice of a TPU pod (needs the package libtpu, no TPU) or for virtual devices of
this machine (--topology=cpu:8), from shapes alone: no weight is read. Prints
the sharding of every parameter, the memory of a device, FLOPs, collectives and
bounds of a step's time; the last line on stdout is JSON.

Of a run of stages each one's step is planned; --hlo then writes FILE.STAGE.

--fill plans the calls of a masked diffusion model that samples with a cache:

  python -m experiments.plan --config=runs/llada/pretrain_8b.gin \\
    --set=FSDP=1 --set=TENSOR=4 --topology=v5p:2x2x1 --fill=16x1024+256

--preset says what an image costs a published vision language model, and
compiles nothing: views, tokens, FLOPs of each tower, bytes of keys and values:

  python -m experiments.plan --preset=smolvlm-256m --image_size=480x640
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

_CONFIG = cli.define_config(FLAGS)
_TOPOLOGY = flags.DEFINE_string(
  "topology",
  None,
  "A slice of a TPU pod, e.g. v5e:4x4, v5p:2x2x4 or v6e:16x16; or virtual "
  "devices of this machine, e.g. cpu:8.",
  flag_values=FLAGS,
)
_SET = cli.define_set(FLAGS, "BATCH=64")
_HLO = flags.DEFINE_string(
  "hlo",
  None,
  "File to write the compiled program to, as XLA's text.",
  flag_values=FLAGS,
)
_FILL = flags.DEFINE_string(
  "fill",
  None,
  "ROWSxPROMPT+LENGTH: plan sampling instead of training: a batch of rows, "
  "tokens of a prompt, and tokens to generate.",
  flag_values=FLAGS,
)
_PRESET = flags.DEFINE_string(
  "preset",
  None,
  "A published vision language model (research/vlm/presets.py): say what an "
  "image of --image_size costs it.",
  flag_values=FLAGS,
)
_IMAGE_SIZE = flags.DEFINE_string(
  "image_size",
  None,
  "With --preset: HEIGHTxWIDTH of an image, in pixels, e.g. 480x640.",
  flag_values=FLAGS,
)
_TEXT_TOKENS = flags.DEFINE_integer(
  "text_tokens",
  0,
  "With --preset: tokens of the question.",
  lower_bound=0,
  flag_values=FLAGS,
)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Plans; returns the result, which the command prints as JSON."""
  del argv
  if _PRESET.value is not None:
    return _image()
  cli.required(config=_CONFIG.value, topology=_TOPOLOGY.value)
  import jax

  # This machine's accelerators are not used, and stay free for others.
  jax.config.update("jax_platforms", "cpu")
  from experiments.core import config
  from experiments.planning import plan_sampling, plan_training
  from experiments.stages import staged
  from research.io import folders
  from research.planning import chips

  run = config.read(_CONFIG.value, _SET.value).experiment
  rows = _FILL.value and plan_sampling.rows(_FILL.value)
  topology = chips.topology(_TOPOLOGY.value)
  if rows:
    return plan_sampling.plan(staged.final(run), topology, rows)
  if not isinstance(run, staged.Staged):
    return plan_training.plan(run, topology, hlo=_HLO.value)
  plans = {}
  for name, experiment in run.in_workdir(folders.folder(".")).stages.items():
    cli.say(f"--- stage {name}")
    hlo = _HLO.value and f"{_HLO.value}.{name}"
    plans[name] = plan_training.plan(experiment, topology, hlo=hlo)
  return {"stages": plans}


def _image() -> dict[str, Any]:
  """Returns what an image costs a published model."""
  cli.required(image_size=_IMAGE_SIZE.value)
  from experiments.planning import plan_images

  return plan_images.plan(_PRESET.value, _IMAGE_SIZE.value, _TEXT_TOKENS.value)


if __name__ == "__main__":
  cli.run(main)
