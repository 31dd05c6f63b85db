"""Plans sampling: calls of a masked diffusion model, compiled ahead of time.

A block is filled by one call that reads whole rows, and by calls that read the
block alone, keys and values of the rest cached (`denoiser.BlockCache`). How
many of the latter a block takes depends on the policy and the text; so each of
the two is planned by itself. No flags, no gin; `experiments.plan --fill=` is
the command.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.core import cli
from experiments.core.experiment import Experiment
from experiments.planning import abstract_step
from research.diffusion.sampling import sampler
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.denoiser import BlockCache
from research.diffusion.sampling.policies import Threshold
from research.generation.sampling import GREEDY
from research.planning import flops, forecast, text
from research.planning.chips import Topology
from research.training import global_batch
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
  """What is sampled.

  Attributes:
    count: rows of a batch.
    prompt: tokens of each.
    length: tokens that are generated.
    block: of them at a time.
  """

  count: int
  prompt: int
  length: int
  block: int = 32


def rows(given: str) -> Rows:
  """Returns what `16x1024+256` stands for: rows, prompt, generated tokens.

  Raises:
    UserError: it stands for nothing.
  """
  count, _, rest = given.partition("x")
  prompt, _, length = rest.partition("+")
  parts = (count, prompt, length)
  if not all(p.isdecimal() and len(p) < 8 and int(p) for p in parts):
    raise UserError(
      f"--fill={given}: expected ROWSxPROMPT+LENGTH, e.g. 16x1024+256"
    )
  return Rows(count=int(count), prompt=int(prompt), length=int(length))


def plan(
  experiment: Experiment, topology: Topology, wanted: Rows
) -> dict[str, Any]:
  """Returns what calls of an experiment's model cost on `topology`.

  Weights are bfloat16, as they are served, cut as the experiment cuts them.

  Args:
    experiment: whose objective has a mask.
    topology: what on.
    wanted: rows.

  Raises:
    UserError: the objective has no mask, or blocks do not divide.
  """
  mask_id = getattr(experiment.objective, "mask_id", -1)
  if mask_id < 0:
    raise UserError(
      f"--fill: the objective is {type(experiment.objective).__name__}, which "
      "has no mask_id; expected one that fills in masks"
    )
  taken = abstract_step.build(experiment, topology.devices)
  mesh, model = taken.mesh, taken.loaded.model.clone(remat="none")
  options = SamplerConfig(
    mask_id=mask_id,
    length=wanted.length,
    block=wanted.block,
    policy=Threshold(threshold=0.9),
  )
  params = jax.tree.map(_served, taken.state.params)
  state = _state(experiment, wanted, mask_id, mesh)
  asked, out = BlockCache(model=model), {}

  def first(params, state, at):
    return _call(asked.prefill, params, state, at, options)

  def again(params, state, at, carry):
    return _call(asked.step, params, state, at, options, carry)

  at = jax.ShapeDtypeStruct((), jnp.int32)
  with jax.set_mesh(mesh):
    compiled = jax.jit(first).lower(params, state, at).compile()
    work = flops.count_flops(first, params, state, at)
    out["first"] = _told(
      "a call for whole rows", compiled, work, mesh, topology, wanted.count
    )
    _, carry = jax.eval_shape(first, params, state, at)
    held = jax.tree.map(
      lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
      carry,
      compiled.output_shardings[1],
    )
    work = flops.count_flops(again, params, state, at, held)
    step = jax.jit(again, donate_argnums=3)
    compiled = step.lower(params, state, at, held).compile()
    out["again"] = _told(
      "a call for a block", compiled, work, mesh, topology, wanted.count
    )
  return {
    "topology": topology.name,
    "chip": topology.chip.name,
    "devices": mesh.size,
    "rows": dataclasses.asdict(wanted),
    **out,
  }


def _call(ask, params, state, at, options, *carry):
  """Returns rows after one call of the model, and its carry."""
  size = options.block
  masked = jax.lax.dynamic_slice_in_dim(state.masked, at, size, axis=1)
  logits, carry = ask(params, state.tokens, state.valid, at, size, *carry)
  state, _ = sampler.fill(state, logits, at, options, GREEDY, masked.sum(-1), 0)
  return state, carry


def _served(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  floating = jnp.issubdtype(x.dtype, jnp.floating)
  dtype = jnp.bfloat16 if floating else x.dtype
  return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)


def _state(experiment, wanted, mask_id, mesh):
  """Returns the shapes of rows before their first call."""
  total = wanted.prompt + wanted.length
  tokens = np.full((wanted.count, total), mask_id)
  masked = np.broadcast_to(np.arange(total) >= wanted.prompt, tokens.shape)
  valid = np.ones_like(masked)
  made = jax.eval_shape(
    lambda key: sampler.begin(tokens, masked, valid, key), jax.random.key(0)
  )
  whole = experiment.mesh.batch(mesh)

  def placed(x):
    if not x.shape:
      return x
    where = global_batch.array_sharding(whole, x.shape)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  return jax.tree.map(placed, made)


def _told(name, compiled, work, mesh, topology, count) -> dict[str, Any]:
  """Returns a call's cost; its tokens are one a row, the least it fills."""
  cost = forecast.forecast(compiled, mesh, topology)
  found = text.as_json(cost, work, count)
  cli.say(f"{name}, at least a token of each row:\n")
  cli.say(text.describe(cost, found))
  return found
