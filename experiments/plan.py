"""Plans an experiment on devices that this machine does not have.

  python -m experiments.plan --config=runs/quickstart.gin --topology=v5e:4x4

Compiles the experiment's training step, sharded over its mesh, for a slice of a
TPU pod (needs the package libtpu, no TPU), for hosts of GPUs
(--topology=h100:8, or h100:4x8 for four hosts; needs the extra cuda-compile, no
GPU) or for emulated devices of this machine (--topology=cpu:8). It needs only
shapes and reads no weights. Prints the sharding of every parameter, memory per
device, FLOPs, collectives and bounds on the time of a step; the last line on
stdout is JSON.

For a run of several stages it plans the step of each; --hlo then writes
FILE.STAGE.

--fill plans sampling from a masked diffusion model with a KV cache:

  python -m experiments.plan --config=runs/llada/pretrain_8b.gin \\
    --set=FSDP=1 --set=TENSOR=4 --topology=v5p:2x2x1 --fill=16x1024+256

--preset prints the cost of an image in a published vision language model, and
compiles nothing: crops, tokens, FLOPs of each module, bytes of the KV cache:

  python -m experiments.plan --preset=smolvlm-256m --image_size=480x640
"""

if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

from collections.abc import Sequence
from typing import Any

from experiments.core import bindings, cli
from experiments.core.definers import definers
from research.errors import UserError

FLAGS = cli.new_flags()
define = definers(FLAGS)

_CONFIG = cli.define_config(FLAGS)
_TOPOLOGY = define.text(
  "topology",
  "A slice of a TPU pod, e.g. v5e:4x4, v5p:2x2x4 or v6e:16x16; GPUs of one "
  "host or of several, e.g. h100:8 or h100:4x8; or virtual devices of this "
  "machine, e.g. cpu:8.",
)
_SET = cli.define_set(FLAGS, "BATCH=64")
_HLO = define.text(
  "hlo", "File to write the compiled program to, as XLA's text."
)
_FILL = define.text(
  "fill",
  "ROWSxPROMPT+LENGTH: plan sampling from a masked diffusion model instead of "
  "training: rows of a batch, tokens of a prompt, tokens to generate.",
)
_CACHE = define.text(
  "cache",
  "With --fill: the KV cache: none, prefix, dual, vicinity:N or delayed; by "
  "default dual, or prefix for a block-causal model.",
)
_GUIDANCE = define.number(
  "guidance",
  "With --fill: the scale of classifier-free guidance; above 0 each step takes "
  "two forward passes.",
  default=0.0,
  lower_bound=0.0,
)
_GENERATE = define.text(
  "generate",
  "ROWSxPROMPT+LENGTH: plan autoregressive generation instead of training.",
)
_PAGES = define.text(
  "pages",
  "With --generate or --search: a paged KV cache, in the notation of `generate "
  "--pages`, e.g. 16 or 128,dtype=int8.",
)
_SEARCH = define.text(
  "search",
  "PROBLEMSxCOPIESxPROMPT+LENGTH: plan a search instead of training: problems "
  "in a batch, solutions per problem, tokens of a problem and of a solution.",
)
_VERIFIER = define.text(
  "verifier",
  "With --search: the run file of the reward model that scores solutions; "
  "--set applies to both run files.",
)
_SCORED = define.integer(
  "scored",
  "With --verifier: how many solutions it scores in one batch; by default all.",
  lower_bound=1,
)
_ADVISE = define.switch(
  "advise",
  "Try other meshes, remat policies, accumulation and packed weights, and rank "
  "what fits.",
)
_COMPILES = define.integer(
  "compiles",
  "With --advise: the maximum number of programs to compile.",
  default=8,
  lower_bound=1,
)
_PRESET = define.text(
  "preset",
  "A published vision language model (research/vlm/presets): print the cost of "
  "an image of --image_size.",
)
_IMAGE_SIZE = define.text(
  "image_size",
  "With --preset: HEIGHTxWIDTH of an image, in pixels, e.g. 480x640.",
)
_TEXT_TOKENS = define.integer(
  "text_tokens",
  "With --preset: tokens of the question.",
  default=0,
  lower_bound=0,
)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Plans; returns the result, which the command prints as JSON."""
  del argv
  if _PRESET.value is not None:
    own = {_PRESET.name, _IMAGE_SIZE.name, _TEXT_TOKENS.name}
    shared = cli.new_flags()
    others = (x for x in FLAGS if x not in own and x not in shared)
    cli.exclusive("with --preset", FLAGS, *others)
    return _image()
  of_images = _IMAGE_SIZE.name, _TEXT_TOKENS.name
  cli.exclusive("without --preset", FLAGS, *of_images)
  cli.required(config=_CONFIG.value, topology=_TOPOLOGY.value)
  cli.run_file(_CONFIG.value, _SET.value)
  _check_flags()
  import jax

  # This machine's accelerators are not used, and stay free for others.
  jax.config.update("jax_platforms", "cpu")
  from research.planning import chips

  topology = chips.topology(_TOPOLOGY.value)
  from experiments.core import config
  from experiments.stages import staged

  run = config.read(_CONFIG.value, _SET.value).experiment
  cli.log(f"tracing {_CONFIG.value} for {_TOPOLOGY.value}")
  if any(flag.value for flag in (_FILL, _GENERATE, _SEARCH)):
    return _sampling(staged.final(run), topology)
  if not isinstance(run, staged.Staged):
    return _training(run, topology, _HLO.value)
  from research.io import folders

  plans = {}
  for name, experiment in run.in_workdir(folders.folder(".")).stages.items():
    cli.say(f"--- stage {name}")
    hlo = _HLO.value and f"{_HLO.value}.{name}"
    plans[name] = _training(experiment, topology, hlo)
  return {"stages": plans}


def _check_flags() -> None:
  """Raises UserError for flags that contradict each other, or do nothing."""
  plans = [f.name for f in (_FILL, _GENERATE, _SEARCH, _ADVISE) if f.value]
  if len(plans) > 1:
    raise UserError(f"--{plans[0]}, --{plans[1]}: expected one of them")
  if not _ADVISE.value:
    cli.exclusive("without --advise", FLAGS, _COMPILES.name)
  if plans:
    cli.exclusive(f"with --{plans[0]}", FLAGS, _HLO.name)
  needs = (
    (_CACHE, (_FILL,)),
    (_GUIDANCE, (_FILL,)),
    (_PAGES, (_GENERATE, _SEARCH)),
    (_VERIFIER, (_SEARCH,)),
    (_SCORED, (_VERIFIER,)),
  )
  for flag, of in needs:
    if flag.value and not any(other.value for other in of):
      names = " or ".join(f"--{other.name}" for other in of)
      raise UserError(f"--{flag.name}: has no effect without {names}")
  if _VERIFIER.value:
    bindings.find(_VERIFIER.value, "verifier")


def _training(run: Any, topology: Any, hlo: str | None) -> dict[str, Any]:
  """Returns the plan of a training step, or advice."""
  from experiments.planning import advice, plan_training

  if _ADVISE.value:
    return advice.advise(run, topology, _COMPILES.value)
  return plan_training.plan(run, topology, hlo=hlo)


def _sampling(run: Any, topology: Any) -> dict[str, Any]:
  """Returns the plan of what the flags ask for instead of training."""
  from experiments.core import config
  from experiments.planning import (
    calls,
    plan_decoding,
    plan_sampling,
    plan_search,
  )
  from experiments.stages import staged
  from research.generation import paging

  if _FILL.value:
    return plan_sampling.plan(
      run,
      topology,
      calls.rows(_FILL.value, "fill"),
      _CACHE.value,
      _GUIDANCE.value,
    )
  pages = paging.parse(_PAGES.value) if _PAGES.value else None
  if _GENERATE.value:
    wanted = calls.rows(_GENERATE.value)
    return plan_decoding.plan(run, topology, wanted, pages)
  verifier = None
  if _VERIFIER.value:
    read = config.read(_VERIFIER.value, _SET.value, flag="verifier")
    verifier = staged.final(read.experiment)
  wanted = plan_search.parse_search(_SEARCH.value)
  return plan_search.plan(run, verifier, topology, wanted, _SCORED.value, pages)


def _image() -> dict[str, Any]:
  cli.required(image_size=_IMAGE_SIZE.value)
  from experiments.planning import plan_images

  return plan_images.plan(_PRESET.value, _IMAGE_SIZE.value, _TEXT_TOKENS.value)


if __name__ == "__main__":
  cli.run(main)
