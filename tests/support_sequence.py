"""Attention over tokens sharded over eight devices, and on one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.flash_attention.api import flash_attention
from kernels_pallas.flash_attention.sharded import (
  AttentionSharding,
  sharded_attention,
  with_positions,
)
from kernels_pallas.masks import Mask, bidirectional_tokens
from kernels_pallas.sequence_parallel import zigzag
from tests import support_hlo

B, T = 2, 32
ROWS = {"rows": 2, "along": 4}

# Tiny arrays: compilation dominates the time.
quick = functools.partial(
  jax.jit,
  compiler_options={
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  },
)


def draw(*shape, seed=0, dtype=jnp.float64):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.standard_normal(shape), dtype)


def documents(seed):
  rng = np.random.default_rng(seed)
  segments = np.sort(rng.integers(0, 3, (B, T)), axis=1)
  segments[:, rng.integers(0, T, 3)] = -1
  return jnp.asarray(segments, jnp.int32)


def padded(*lengths):
  """Positions of right-padded rows."""
  steps = np.broadcast_to(np.arange(T), (B, T))
  live = steps < np.asarray(lengths)[:, None]
  return jnp.asarray(np.where(live, steps, -1), jnp.int32)


def bounds():
  """Two intervals a query, some of them empty, some across all shards."""
  rng = np.random.default_rng(4)
  found = np.sort(rng.integers(0, T + 1, (B, 4, T)), axis=1)
  found[1, :, 5:9] = 0
  return jnp.asarray(found, jnp.int32)


MASKS = {
  "full": lambda: Mask.full(),
  "causal": lambda: Mask.causal(),
  # Queries and keys at the same index belong to different documents.
  "segments": lambda: Mask.causal((9, None), (documents(1), documents(2))),
  "window": lambda: Mask.full((5, 2)),
  "prefix": lambda: Mask.prefix_lm(jnp.asarray([7, 19], jnp.int32)),
  "padded": lambda: Mask.causal(
    q_positions=padded(32, 9), kv_positions=padded(21, 32)
  ),
  "function": lambda: Mask.where(lambda q, k: (q - k) % 5 < 2, (19, None)),
  "intervals": lambda: Mask.intervals(bounds(), (19, None)),
  # Coordinates of keys that are no positions.
  "marked": lambda: bidirectional_tokens(documents(1) > 0),
}


def mesh_of(sizes):
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
  )


def operands(heads=(4, 2, 4, 4), dtype=jnp.float64, length=T, batch=B):
  """q, k, v, sinks and the cotangents of the output and log-sum-exp."""
  N, K, H, Hv = heads
  shapes = {
    "q": (batch, length, N, H),
    "k": (batch, length, K, H),
    "v": (batch, length, K, Hv),
    "sinks": (N,),
    "do": (batch, length, N, Hv),
    "dlse": (batch, N, length),
  }
  return {
    name: draw(*shape, seed=seed, dtype=dtype)
    for seed, (name, shape) in enumerate(shapes.items())
  }


def results(attend, mask, x, **options):
  """Output, log-sum-exp and gradients of q, k, v and sinks.

  Args:
    attend: `flash_attention` or `sharded_attention`.
    mask: Which keys each query sees.
    x: Some of `operands`; without sinks or dlse, these are not used.
    **options: Options of `attend`.
  """
  names = [n for n in ("q", "k", "v", "sinks") if n in x]

  def loss(inputs):
    o, lse = attend(**inputs, mask=mask, return_lse=True, **options)
    total = jnp.sum(o * x["do"])
    if "dlse" in x:
      total += jnp.sum(jnp.where(jnp.isneginf(lse), 0, lse) * x["dlse"])
    return total, (o, lse)

  inputs = {name: x[name] for name in names}
  (_, out), found = jax.value_and_grad(loss, has_aux=True)(inputs)
  return {"o": out[0], "lse": out[1]} | {f"d{n}": found[n] for n in names}


def alone(mask, x, **options):
  """`results` by definition, on one device."""

  @quick
  def run(mask, x):
    return results(flash_attention, mask, x, backend="reference", **options)

  return run(mask, x)


AXES = {
  **{"lse": 2, "dlse": 2, "bounds": 2},
  **{"sinks": None, "dsinks": None, "prefix": None},
}
"""Which axis of an array has the tokens; 1 for all others."""


def taken(tree, at):
  """Returns named arrays with the tokens at the given indices."""

  def one(name, x):
    axis = AXES.get(name, 1)
    return x if axis is None or x is None else jnp.take(x, at, axis)

  return {name: one(name, x) for name, x in tree.items()}


def reordered(mask, at):
  """Returns a mask over the tokens at the given indices."""
  names = ("q_positions", "kv_positions", "q_segments", "kv_segments")
  names += ("prefix", "bounds")
  arrays = taken({name: getattr(mask, name) for name in names}, at)
  return dataclasses.replace(mask, **arrays)


def shared(mask, x, sizes, cut, shards=0, **options):
  """`results` on a mesh, in zig-zag order over `shards` if there are any."""
  at = np.arange(x["q"].shape[1])
  if shards:
    at = zigzag.zigzag(len(at), shards)
    mask, x = reordered(with_positions(mask, T, T), at), taken(x, at)

  def run(mask, x):
    return results(sharded_attention, mask, x, sharding=cut, **options)

  with jax.set_mesh(mesh_of(sizes)):
    found = quick(run)(mask, x)
  return taken(found, np.argsort(at))


def program(sizes, cut, x, mask=None):
  """Compiles the gradient on a mesh, with operands sharded as they are used.

  Returns:
    Its text, and its collectives over single axes of the mesh.
  """
  mesh = mesh_of(sizes)
  mask = Mask.causal() if mask is None else mask
  place = jax.sharding.NamedSharding(
    mesh, jax.P(cut.batch, cut.tokens, cut.heads)
  )
  x = {name: x[name] for name in ("q", "k", "v", "do")}

  def run(x):
    return results(sharded_attention, mask, x, sharding=cut)

  with jax.set_mesh(mesh):
    done = jax.jit(run, in_shardings=place).lower(x).compile()
  return done, support_hlo.collectives(done.as_text(), mesh)


RING = AttentionSharding(("rows",), ring=("along",))
GATHER = AttentionSharding(("rows",), length=("along",))
ULYSSES = AttentionSharding(("rows",), ulysses=("along",))
