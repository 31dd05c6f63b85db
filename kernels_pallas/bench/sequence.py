"""Checks of attention whose keys come in parts, or lie on several devices.

The parts of a ring are what kernels see of it: outputs in float32, a
log-sum-exp of every part, and gradients of a part of the keys by the
log-sum-exp of all. They run on one device; the ring itself, and the other ways
across devices, over all that there are.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.bench import attention, jobs
from kernels_pallas.bench.attention import Problem
from kernels_pallas.bench.jobs import Job, Target
from kernels_pallas.flash_attention.api import prepare
from kernels_pallas.flash_attention.cotangents import finished, queries
from kernels_pallas.flash_attention.sharded import Cut, sharded_attention
from kernels_pallas.flash_attention.spec import Operands
from kernels_pallas.masks import Mask
from kernels_pallas.sequence_parallel.combine import combine
from kernels_pallas.sequence_parallel.zigzag import halves

PARTS = 4
AXIS = "along"
CUTS = {
  "ring": Cut(ring=(AXIS,)),
  "gathered": Cut(length=(AXIS,)),
  "exchanged": Cut(ulysses=(AXIS,)),
}


def checks(target: Target) -> list[Job]:
  """Parts in order, and all ways across devices."""
  x = Problem(causal_by_position, T=1024, S=1024, N=8, K=8, extras=("sinks",))
  if target.tiny:
    x = dataclasses.replace(x, T=128, S=128, N=2, K=2, H=64, Hv=64)
  found = []
  for direction, times in (("forward", 1.0), ("backward", 3.5)):
    runs = {"parts": functools.partial(ring_by_parts, target, x, direction)}
    for way, cut in CUTS.items():
      attend = functools.partial(_across, target, x, cut)
      runs[f"devices/{way}"] = functools.partial(
        attention.results, x, direction, attend
      )
    for name, run in runs.items():
      check = attention.check_against_reference(x, direction, run)
      if name != "parts":
        around = functools.partial(_all_devices, target)
        check = dataclasses.replace(check, around=around)
      name = f"sequence/{name}/{direction}"
      found.append(jobs.check(target, name, check, times * x.flops))
  return found


def causal_by_position(T, S):
  """Causal, by positions: a shard does not know where it begins."""
  return Mask.causal(
    (3 * T // 4, None),
    q_positions=jnp.arange(T)[None],
    kv_positions=jnp.arange(S)[None],
  )


def ring_by_parts(
  target: Target,
  x: Problem,
  direction: str,
  operands: dict[str, Any],
  mask: Mask,
) -> dict[str, Any]:
  """What a ring of `PARTS` devices computes, one step after the other.

  Args:
    target: What it runs on.
    x: The call.
    direction: 'forward' or 'backward'.
    operands: Named arrays.
    mask: By positions.
  """
  whole = Operands(**operands, mask=mask)
  tiles = attention.tiles(target, x.H, x.Hv, x)
  backend, spec = prepare(
    whole, backend=target.backend, config=tiles, interpret=target.interpret()
  )
  size = x.S // PARTS
  spec = dataclasses.replace(spec, blocks=halves(spec.blocks, x.T, size))
  partial = dataclasses.replace(spec, output=jnp.float32)
  steps = [_step(whole, slice(n * size, (n + 1) * size)) for n in range(PARTS)]
  found = [backend.attend(partial, step) for step in steps]
  o, lse = combine(*zip(*found, strict=True))
  sinks = jnp.broadcast_to(whole.sinks[None, :, None], lse.shape)
  o, lse = combine((o, jnp.zeros_like(o)), (lse, sinks))
  if direction == "forward":
    return {"o": o, "lse": lse}
  o = o.astype(whole.q.dtype)
  do, dlse = attention.cotangents(x)
  rows = queries(whole, o, lse, do.astype(o.dtype), dlse)
  parts = [backend.gradients(spec, step, rows) for step in steps]
  total = Operands(
    q=sum(part.q for part in parts),
    k=jnp.concatenate([part.k for part in parts], 1),
    v=jnp.concatenate([part.v for part in parts], 1),
    mask=None,
  )
  found = finished(whole, total, rows)
  names = ("q", "k", "v", "sinks")
  return {f"d{name}": getattr(found, name) for name in names}


def _step(whole: Operands, keys: slice) -> Operands:
  """The keys of one shard."""
  mask = dataclasses.replace(
    whole.mask, kv_positions=whole.mask.kv_positions[:, keys]
  )
  return whole._replace(
    k=whole.k[:, keys], v=whole.v[:, keys], mask=mask, sinks=None
  )


def _across(target: Target, x: Problem, cut: Cut, **call):
  """Over all devices of the mesh, of which there may be one."""
  how = {"config": attention.tiles(target, x.H, x.Hv, x)}
  if target.interpret() is not None:
    how["interpret"] = target.interpret()
  return sharded_attention(**call, cut=cut, backend=target.backend, **how)


def _all_devices(target: Target):
  """A mesh that is set."""
  count = 1 if target.tiny else jax.device_count()
  return jax.set_mesh(
    jax.make_mesh(
      (count,),
      (AXIS,),
      axis_types=(jax.sharding.AxisType.Auto,),
      devices=jax.devices()[:count],
    )
  )
