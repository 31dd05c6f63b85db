"""Plans autoregressive generation: prefill, and a step of decoding.

The programs are those of `generate`: all prompts at once and a cache as long as
prompt and answer, or pages of it. A step is one round of the loop over tokens,
when the cache is full. No flags, no gin; `experiments.plan --generate=` is the
command.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.core import cli
from experiments.core.experiment import Experiment
from experiments.planning import abstract_step
from experiments.planning.calls import (
  Planner,
  Rows,
  batch_shape,
  largest,
  placed,
  served,
)
from research import sharding
from research.generation import decoding, generate_paged_rows
from research.generation.generate import CHUNK, bucket, pad_stop_tokens
from research.generation.paging import Paging
from research.generation.sampling import Sampling
from research.nn.cache import paged
from research.nn.transformer import Transformer
from research.planning.chips import Topology
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
  """A language model that generates, by shapes.

  Attributes:
    params: its weights as they are served, sharded.
  """

  model: Transformer
  params: Any
  batch_sharding: Any
  planner: Planner
  sampling: Sampling = Sampling(temperature=1.0)

  @property
  def stop(self) -> Any:
    """The shape of the tokens that end a row."""
    return jax.ShapeDtypeStruct(pad_stop_tokens([0]).shape, jnp.int32)


def policy(experiment: Experiment, topology: Topology) -> Policy:
  """Returns an experiment's model, to be planned on `topology`.

  Raises:
    UserError: it is no language model.
  """
  taken = abstract_step.build(experiment, topology.devices)
  model = taken.loaded.model
  if not isinstance(model, Transformer):
    raise UserError(
      f"--generate: the model is a {type(model).__name__}, expected a language"
      " model, a Transformer"
    )
  if getattr(experiment.objective, "mask_id", -1) >= 0:
    raise UserError(
      "--generate: the objective is masked diffusion, expected next-token"
      " prediction; plan its sampler with --fill"
    )
  return Policy(
    model=model.clone(remat="none"),
    params=served(taken.state.params),
    batch_sharding=experiment.mesh.batch(taken.mesh),
    planner=Planner(mesh=taken.mesh, topology=topology),
  )


def plan(
  experiment: Experiment,
  topology: Topology,
  request: Rows,
  paging: Paging | None = None,
) -> dict[str, Any]:
  """Returns what generation costs on `topology`, and prints it.

  Weights are bfloat16, as they are served, or packed, cut as the experiment
  cuts them.

  Args:
    paging: pages of the cache; None for one array a row.

  Raises:
    UserError: it is no language model, or it fills in masks.
  """
  model = policy(experiment, topology)
  made = calls(model, request, 1, paging)
  return {
    **model.planner.devices,
    "rows": dataclasses.asdict(request),
    **made,
    **largest(made),
  }


def calls(
  model: Policy, request: Rows, copies: int = 1, paging: Paging | None = None
) -> dict[str, Any]:
  """Returns the costs of `prefill` and of `decode`, a step, and both together.

  Args:
    request: rows; `count` is that of prompts.
    copies: answers to each prompt, which is read once.
  """
  if paging is None:
    out = dense(model, request, copies)
  else:
    out = in_pages(model, request, copies, paging)
  parts = [out.get(name, {}).get("seconds") for name in ("prefill", "decode")]
  if None not in parts:
    first, step = parts
    rows = request.count * copies
    first *= 1 if paging is None else request.count
    seconds = first + (request.length - 1) * step
    out["seconds"] = seconds
    out["tokens_per_s"] = rows * request.length / seconds
    cli.say(
      f"{request.length} tokens of each of {rows} rows take {seconds:.3g} s at"
      f" least, {out['tokens_per_s']:,.0f} tokens a second at most"
    )
  return out


def dense(model: Policy, request: Rows, copies: int) -> dict[str, Any]:
  """Returns the costs with a cache that has room for all tokens of each row."""
  total = request.count * copies
  capacity = bucket(request.prompt + request.length)

  def prefill(params, tokens, lengths, key, examples, limit, stop):
    return decoding.prefill(
      model.model,
      params,
      *(tokens, lengths, model.sampling, key, examples, limit, stop),
      capacity=capacity,
    )

  def decode(params, state, stop):
    return decoding.decode(
      model.model, params, state, model.sampling, stop, CHUNK
    )

  found, made = model.planner.plan(
    f"prefill of {request.count} prompts, {total} rows",
    prefill,
    model.params,
    batch_shape((request.count, request.prompt), model.batch_sharding),
    batch_shape((request.count,), model.batch_sharding),
    jax.eval_shape(jax.random.key, 0),
    *(jax.ShapeDtypeStruct((total,), jnp.int32),) * 2,
    model.stop,
    tokens=request.count * request.prompt,
  )
  out = {"prefill": found}
  if made is not None:
    out["decode"], _ = model.planner.plan(
      f"a step of decoding, {total} rows of {capacity}",
      *(decode, model.params, made[0], model.stop),
      tokens=total,
      donate=(1,),
      loops=1,
    )
  return out


def in_pages(
  model: Policy, request: Rows, copies: int, paging: Paging
) -> dict[str, Any]:
  """Returns the costs with pages, which copies of a prompt share.

  Prompts are read one by one; `prefill` is that of one.
  """
  total, size = request.count * copies, paging.size
  shared = request.prompt // size
  width = -(-(request.prompt + request.length) // size)
  count = paging.count or request.count * shared + total * (width - shared)
  mesh = model.planner.mesh

  def empty(params):
    return paged.empty_pool(model.model, params, count, size, paging.dtype)

  def prefill(params, pool, table, length, tokens, number):
    return generate_paged_rows.prefill(
      model.model, params, pool, table, length, tokens, number
    )

  def decode(params, pool, length, rows, table, stop):
    return generate_paged_rows.decode(
      *(model.model, params, pool, length, rows, table),
      *(model.sampling, stop, CHUNK),
    )

  with jax.set_mesh(mesh), model.planner.topology.lowering():
    lowered = jax.jit(empty).lower(model.params)
    pool = jax.eval_shape(empty, model.params)
  where = model.planner.topology.compile(lowered).output_shardings
  pool = jax.tree.map(placed, pool, where)
  one = jax.ShapeDtypeStruct((1,), jnp.int32)
  whole = sharding.replicated(mesh)
  found, made = model.planner.plan(
    "prefill of one prompt",
    prefill,
    model.params,
    pool,
    *(jax.ShapeDtypeStruct((1, width), jnp.int32), one),
    *(jax.ShapeDtypeStruct((1, bucket(request.prompt)), jnp.int32), one),
    tokens=request.prompt,
    donate=(1,),
  )
  out = {"prefill": found}
  if made is None:
    return out
  rows = jax.eval_shape(
    lambda key: generate_paged_rows.empty_rows(total, key), jax.random.key(0)
  )
  length = jax.ShapeDtypeStruct((total,), jnp.int32)
  length, rows = jax.tree.map(lambda x: placed(x, whole), (length, rows))
  out["decode"], _ = model.planner.plan(
    f"a step of decoding, {total} rows in {count} pages of {size}",
    decode,
    *(model.params, made[1], length, rows),
    jax.ShapeDtypeStruct((total, width), jnp.int32),
    model.stop,
    tokens=total,
    donate=(1, 2, 3),
    loops=1,
  )
  return out
