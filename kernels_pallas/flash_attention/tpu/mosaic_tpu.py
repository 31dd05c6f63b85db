"""Flash attention as Mosaic TPU kernels: the mosaic_tpu backend.

`forward_kernel` and `backward_kernels` contain the kernels, `problem` prepares
their arguments. The saved output and log-sum-exp have the same checkpoint names
as in `blockwise`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.flash_attention.cotangents import (
  QueryCotangents,
  cast_gradients,
  query_cotangents,
  save_residuals,
)
from kernels_pallas.flash_attention.spec import Operands, Spec
from kernels_pallas.flash_attention.tpu import backward_kernels as back
from kernels_pallas.flash_attention.tpu import bias_gradient, problem
from kernels_pallas.flash_attention.tpu.forward_kernel import forward
from kernels_pallas.flash_attention.tpu.tile import unit
from kernels_pallas.flash_attention.tpu.tile_sizes import LANES, Tile, Tiles

FUSED_KEY_TILES = 8
"""Most key tiles for which 'auto' stores partial dq in memory."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def mosaic_tpu_attention(
  spec: Spec, interpret: Any, x: Operands
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """Softmax attention on a TPU, with a custom gradient.

  kernels_pallas/MATH.md 1 and 3 have the definition and the gradients.
  Differentiable once in q, k, v, bias and sinks, through both results.

  Args:
    spec: Static part; `spec.blocks` is a `Tiles`.
    interpret: False to compile, or as in `pl.pallas_call`.
    x: Arrays.

  Returns:
    The output in the dtype of q and the natural log-sum-exp of the logits
    (sinks included, before dropout); 0 and -inf where a query sees no key and
    there is no sink.

  Raises:
    ValueError: TPUs do not support the dtype or tile, unless interpreted.
  """
  tiles = _tiles(spec, interpret, x)
  p = problem.prepare(spec, x, tiles.forward)
  o, lse = forward(p, interpret)
  T = x.q.shape[1]
  return jnp.swapaxes(o[:, :, :T], 1, 2), lse[:, :, 0, :T]


def _forward(spec, interpret, x):
  return save_residuals(
    x, *mosaic_tpu_attention.__wrapped__(spec, interpret, x)
  )


def _backward(spec, interpret, saved, cotangents):
  x, o, lse = saved
  rows = query_cotangents(x, o, lse, *cotangents)
  found = mosaic_tpu_gradients(spec, interpret, x, rows)
  return (cast_gradients(x, found, rows),)


def mosaic_tpu_gradients(
  spec: Spec, interpret: Any, x: Operands, rows: QueryCotangents
) -> Operands:
  """Returns the gradients of q, k, v and bias in the accumulator dtype.

  Args:
    spec: Static part; `spec.blocks` is a `Tiles`.
    interpret: False to compile, or as in `pl.pallas_call`.
    x: Arrays; sinks are ignored.
    rows: Per-query inputs, computed over these keys and possibly others.
  """
  T, S = x.q.shape[1], x.k.shape[1]
  tiles = _tiles(spec, interpret, x)

  def prepare(tile):
    return _with_cotangents(problem.prepare(spec, x, tile), *rows)

  p = prepare(tiles.dkv)
  if _is_fused(tiles, p):
    dq, dk, dv = back.fused(p, interpret)
  else:
    dk, dv = back.dkv(p, interpret)
    dq = back.dq(prepare(tiles.dq), interpret)
  dbias = None
  if x.bias is not None:
    dbias = bias_gradient.dbias(prepare(tiles.dq), x.bias.shape, interpret)
  return Operands(
    q=jnp.swapaxes(dq[:, :, :T], 1, 2),
    k=jnp.swapaxes(dk[:, :, :S], 1, 2),
    v=jnp.swapaxes(dv[:, :, :S], 1, 2),
    mask=None,
    bias=dbias,
  )


def _with_cotangents(p: problem.Problem, do, lse, shift) -> problem.Problem:
  """Adds the arrays of the backward pass to the problem."""
  t = p.tile.q
  more = {
    "do": problem.heads_first(do.astype(p.arrays["q"].dtype), t),
    "lse": problem.pad(lse * unit(p), 2, t, jnp.inf)[:, :, None],
    "shift": problem.pad(shift, 2, t)[:, :, None],
  }
  return dataclasses.replace(p, arrays={**p.arrays, **more})


def _is_fused(tiles: Tiles, p: problem.Problem) -> bool:
  if tiles.backward == "auto":
    return p.tiles[1] <= FUSED_KEY_TILES
  return tiles.backward == "fused"


def _tiles(spec: Spec, interpret: Any, x: Operands) -> Tiles:
  """Returns the call's tiles; raises if no TPU supports the call."""
  tiles = spec.blocks
  if not isinstance(tiles, Tiles):
    raise ValueError(
      f"config: found {tiles!r}, expected a `tile_sizes.Tiles` for mosaic_tpu"
    )
  if interpret:
    return tiles
  if x.q.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(
      f"mosaic_tpu: found {x.q.dtype}, expected bfloat16 or float32, which are "
      "what TPUs compute in"
    )
  for tile in (tiles.forward, tiles.dkv, tiles.dq):
    _check(tile)
  return tiles


def _check(tile: Tile) -> None:
  if tile.q_part % LANES or tile.kv_part % LANES:
    raise ValueError(
      f"tile: found parts {tile.q_part} and {tile.kv_part}, expected multiples "
      f"of {LANES} to run on a TPU"
    )


mosaic_tpu_attention.defvjp(_forward, _backward)
