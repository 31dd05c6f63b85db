"""Plans sampling of a masked diffusion model: calls compiled ahead of time.

A block is filled by one call that reads whole rows, and by calls that read what
the sampler's cache leaves to be read (`make_denoiser`: nothing is kept, or keys
and values of the prefix, of all around the block, or all but what was just
filled). How many of the latter a block takes depends on the policy and the
text; so each of the two is planned by itself. No flags, no gin;
`experiments.plan --fill=` is the command.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.core.experiment import Experiment
from experiments.planning import abstract_step
from experiments.planning.calls import Planner, Rows, largest, placed, served
from research.diffusion.sampling import sampler
from research.diffusion.sampling.classifier_free_guidance import with_prompt
from research.diffusion.sampling.config import CACHES, SamplerConfig
from research.diffusion.sampling.make_denoiser import make_denoiser
from research.diffusion.sampling.policies import Threshold
from research.generation.sampling import GREEDY
from research.planning.chips import Topology
from research.training import global_batch
from research.typing import UserError

BLOCK = 32
"""Tokens that are filled at a time, unless the model has blocks of its own."""


def plan(
  experiment: Experiment,
  topology: Topology,
  request: Rows,
  cache: str | None = None,
  guidance: float = 0.0,
  block: int | None = None,
) -> dict[str, Any]:
  """Returns what calls of an experiment's model cost on `topology`.

  Weights are bfloat16, as they are served, or packed, cut as the experiment
  cuts them.

  Args:
    experiment: whose objective has a mask.
    cache: what is kept from call to call, as `generate --cache=` has it; by
      default dual, or prefix for a model of blocks.
    guidance: by the prompt; above 0 each call reads rows twice.
    block: tokens that are filled at a time; by default the model's, or 32.

  Raises:
    UserError: the objective has no mask, blocks do not divide, or the cache is
      not one for the model.
  """
  mask_id = getattr(experiment.objective, "mask_id", -1)
  if mask_id < 0:
    raise UserError(
      f"--fill: the objective is {type(experiment.objective).__name__}, which "
      "has no mask_id; expected one of masked diffusion"
    )
  taken = abstract_step.build(experiment, topology.devices)
  planner = Planner(mesh=taken.mesh, topology=topology)
  own = getattr(experiment.objective, "block", None)
  asked = cache or ("dual" if own is None else "prefix")
  options = SamplerConfig(
    mask_id=mask_id,
    length=request.length,
    block=block or own or min(BLOCK, request.length),
    policy=Threshold(threshold=0.9),
    cache=_cache(asked),
    guidance=guidance,
  )
  model = taken.loaded.model.clone(remat="none")
  denoiser = make_denoiser(options, model, block=own)
  state = _state(experiment, request, mask_id, planner.mesh)
  params = served(taken.state.params)
  if guidance:
    params = with_prompt(params, state.masked)
  at = jax.ShapeDtypeStruct((), jnp.int32)

  def first(params, state, at):
    return _call(denoiser.prefill, params, state, at, options)

  def again(params, state, at, carry):
    return _call(denoiser.step, params, state, at, options, carry)

  # At least a token of each row.
  out, tokens = {}, request.count
  out["first"], made = planner.plan(
    "a call for whole rows", first, params, state, at, tokens=tokens
  )
  if made is not None:
    out["again"], _ = planner.plan(
      f"a later call, cache {asked}",
      *(again, params, state, at, made[1]),
      tokens=tokens,
      donate=(3,),
    )
  return {
    **planner.devices,
    "rows": dataclasses.asdict(request),
    "cache": asked,
    "guidance": guidance,
    "block": options.block,
    **out,
    **largest(out),
  }


def _cache(given: str) -> Any:
  try:
    return CACHES.parse(given)
  except UserError as error:
    raise UserError(f"--cache={given}: {error}") from error


def _call(ask, params, state, at, options, *carry):
  """Returns rows after one call of the model, and its carry."""
  size = options.block
  masked = jax.lax.dynamic_slice_in_dim(state.masked, at, size, axis=1)
  logits, carry = ask(params, state.tokens, state.valid, at, size, *carry)
  state, _ = sampler.fill(state, logits, at, options, GREEDY, masked.sum(-1), 0)
  return state, carry


def _state(experiment, request, mask_id, mesh):
  """Returns the shapes of rows before their first call."""
  total = request.prompt + request.length
  tokens = np.full((request.count, total), mask_id)
  masked = np.broadcast_to(np.arange(total) >= request.prompt, tokens.shape)
  valid = np.ones_like(masked)
  made = jax.eval_shape(
    lambda key: sampler.begin(tokens, masked, valid, key), jax.random.key(0)
  )
  whole = experiment.mesh.batch(mesh)

  def cut(x):
    if not x.shape:
      return x
    return placed(x, global_batch.array_sharding(whole, x.shape))

  return jax.tree.map(cut, made)
