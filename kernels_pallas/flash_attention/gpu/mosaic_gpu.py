"""Flash attention as Mosaic GPU kernels: the mosaic_gpu backend.

`sm90_forward` and `sm90_backward` contain the kernels for Hopper,
`sm80_forward` and `sm80_backward` those for Ampere and Ada, `sm100_forward` and
`sm100_backward` those for Blackwell; `problem` prepares their arguments. The
saved output and log-sum-exp have the same checkpoint names as in `blockwise`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.common.target_platform import NO_TCGEN05, vary_like
from kernels_pallas.flash_attention.cotangents import (
  QueryCotangents,
  cast_gradients,
  query_cotangents,
  save_residuals,
)
from kernels_pallas.flash_attention.gpu import (
  problem,
  sm80_backward,
  sm80_forward,
  sm90_backward,
  sm90_forward,
  sm100_backward,
  sm100_forward,
)
from kernels_pallas.flash_attention.gpu.support import unsupported
from kernels_pallas.flash_attention.gpu.tile import LOG2E
from kernels_pallas.flash_attention.gpu.tile_sizes import GpuTiles
from kernels_pallas.flash_attention.spec import Operands, Spec
from kernels_pallas.flash_attention.tpu.problem import pad

FORWARD = {
  "wgmma": sm90_forward,
  "mma": sm80_forward,
  "tcgen05": sm100_forward,
}
BACKWARD = {
  "wgmma": sm90_backward,
  "mma": sm80_backward,
  "tcgen05": sm100_backward,
}
"""Kernel modules by `GpuTiles.cores`."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def mosaic_gpu_attention(
  spec: Spec, interpret: Any, x: Operands
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """Softmax attention on a GPU, with a custom gradient.

  kernels_pallas/MATH.md 1 and 3 have the definition and the gradients.
  Differentiable once in q, k, v and sinks, through both results.

  Args:
    spec: Static part; `spec.blocks` is a `GpuTiles`.
    interpret: False to compile, or a `plgpu.InterpretGPUParams`.
    x: Arrays.

  Returns:
    The output, in the dtype of q unless `spec.output` is set, and the natural
    log-sum-exp of the logits (sinks included, before dropout); 0 and -inf where
    a query sees no key and there is no sink.

  Raises:
    ValueError: The kernels do not support the call; names a backend that does.
  """
  tiles = _tiles(spec, interpret, x)
  p = problem.prepare(spec, x, tiles.forward, problem.KEYS)
  o, lse = FORWARD[tiles.cores].forward(p, interpret)
  T, Hv = x.q.shape[1], x.v.shape[-1]
  return _typed(x, (o[:, :T, :, :Hv], lse[:, :, :T]))


def _typed(x: Operands, results: Any) -> Any:
  """Marks results as varying over the mesh axes that any operand varies over.

  Kernel results carry no such types: JAX would refuse gradients, or sum the
  cotangents of all devices.
  """
  return jax.tree.map(lambda y: vary_like(y, (x.q, x.k, x.v)), results)


def _forward(spec, interpret, x):
  return save_residuals(
    x, *mosaic_gpu_attention.__wrapped__(spec, interpret, x)
  )


def _backward(spec, interpret, saved, cotangents):
  x, o, lse = saved
  rows = query_cotangents(x, o, lse, *cotangents)
  found = rounded_gradients(spec, interpret, x, rows)
  return (cast_gradients(x, found, rows),)


def mosaic_gpu_gradients(
  spec: Spec, interpret: Any, x: Operands, rows: QueryCotangents
) -> Operands:
  """Returns the gradients of q, k and v in float32.

  Args:
    spec: Static part; `spec.blocks` is a `GpuTiles`.
    interpret: False to compile, or a `plgpu.InterpretGPUParams`.
    x: Arrays; sinks are ignored.
    rows: Per-query inputs, computed over these keys and possibly others.
  """
  wide = dataclasses.replace(spec, output=jnp.float32)
  return rounded_gradients(wide, interpret, x, rows)


def rounded_gradients(
  spec: Spec, interpret: Any, x: Operands, rows: QueryCotangents
) -> Operands:
  """As `mosaic_gpu_gradients`, but rounded once to the output's dtype.

  Args:
    spec, interpret, x, rows: As in `mosaic_gpu_gradients`.
  """
  (_, T, _, H), S, Hv = x.q.shape, x.k.shape[1], x.v.shape[-1]
  tiles = _tiles(spec, interpret, x)
  back = BACKWARD[tiles.cores]

  def prepare(tile, streamed):
    return _with_cotangents(problem.prepare(spec, x, tile, streamed), *rows)

  dq = back.dq(prepare(tiles.dq, problem.KEYS), interpret)
  p, found = prepare(tiles.dkv, problem.QUERIES), {}
  for names in tiles.gradients:
    found |= back.dkv(p, names, interpret)
  return _typed(
    x,
    Operands(
      q=dq[:, :T, :, :H],
      k=found["dk"][:, :S, :, :H],
      v=found["dv"][:, :S, :, :Hv],
      mask=None,
    ),
  )


def _with_cotangents(p: problem.Problem, do, lse, shift) -> problem.Problem:
  """Adds the arrays of the backward pass to the problem."""
  T = p.dims[3]
  do = problem.padded(pad(do.astype(p.arrays["q"].dtype), 1, T), 1)
  rows = (pad(lse * LOG2E, 2, T, jnp.inf), pad(shift, 2, T))
  more = {"do": do, "stats": jnp.stack(rows, axis=2)}
  return dataclasses.replace(p, arrays={**p.arrays, **more})


def _tiles(spec: Spec, interpret: Any, x: Operands) -> GpuTiles:
  """Returns the call's tiles; raises if the kernels do not support the call."""
  tiles = spec.blocks
  if not isinstance(tiles, GpuTiles):
    raise ValueError(
      f"config: found {tiles!r}, expected a `tile_sizes.GpuTiles` for "
      "mosaic_gpu"
    )
  reason = unsupported(x.q, x.k, x.v, x.bias, spec.precision)
  if reason is not None:
    raise ValueError(f"mosaic_gpu: {reason}; backend='xla_blockwise' takes it")
  reason = NO_TCGEN05 if tiles.cores == "tcgen05" else None
  if reason is not None:
    raise ValueError(f"mosaic_gpu: {reason}; backend='xla_blockwise' does not")
  if interpret and tiles.cores != "tcgen05" and tiles.operand != "shared":
    raise ValueError(
      "interpret: the GPU interpreter has no matmul with operands in "
      "registers; pass config=GpuTiles(operand='shared')"
    )
  return tiles


mosaic_gpu_attention.defvjp(_forward, _backward)
