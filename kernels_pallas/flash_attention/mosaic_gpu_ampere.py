"""The forward kernel for GPUs before Hopper: `mma` and `cp.async`.

A block is one warpgroup, 64 queries of a head, with one buffer for keys and one
for values: values arrive while scores are computed, and the next keys while
probabilities are and meet the values (FlashAttention-2's order). That is little
shared memory, and several blocks a multiprocessor hide the rest. Nothing here
has a barrier in memory: those that other warpgroups could wait on are Hopper's.

The GPU interpreter has neither instruction: there a copy is an assignment and a
product a `jnp.dot`, while masks, softmax, loops and the table are the same.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention import mosaic_gpu_stream as stream
from kernels_pallas.flash_attention import mosaic_gpu_tile as tile
from kernels_pallas.flash_attention.mosaic_gpu_problem import Problem
from kernels_pallas.flash_attention.mosaic_gpu_tiling import COLUMNS, ROWS
from kernels_pallas.flash_attention.mosaic_tpu_problem import varying

DEPTH = 16
"""Terms that one `mma` sums."""


def forward(p: Problem, interpret: Any) -> tuple[jax.Array, jax.Array]:
  """The output [B, T, N, Hv] and log-sum-exp [B, N, T], padding included.

  Args:
    p: The problem, keys streamed, with one group.
    interpret: As of `plgpu.kernel`.
  """
  (B, N, _, T, _, H, Hv), t, q = p.dims, p.tile, p.arrays["q"]
  buffers = {
    "q": stream.buffer((1, ROWS, H), q.dtype),
    "k": stream.buffer((1, t.streamed, H), q.dtype),
    "v": stream.buffer((1, t.streamed, Hv), q.dtype),
  }
  if p.spec.blocks.operand == "shared":
    buffers["p"] = stream.buffer((ROWS, t.streamed), q.dtype)
  call = plgpu.kernel(
    functools.partial(_kernel, p, bool(interpret)),
    out_type=[
      varying(q, (B, T, N, Hv), p.spec.output or q.dtype),
      varying(q, (B, N, T), jnp.float32),
    ],
    scratch_types=[buffers],
    grid=(N, p.lines, B),
    grid_names=("head", "line", "batch"),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    kernel_name="flash_attention_forward_mma",
    interpret=interpret,
    **stream.estimate(p, 2),
  )
  # `cp.async` takes a head only out of rows that are flat.
  flat = {name: _flat(p.arrays[name]) for name in ("q", "k", "v")}
  return tuple(call({**p.arrays, **flat}))


def _flat(x: jax.Array) -> jax.Array:
  return x.reshape(*x.shape[:2], -1)


def _columns(head: Any, size: int):
  return pl.ds(head * size, size)


def _kernel(p, interpreted, refs, o_ref, lse_ref, smem):
  b, h = lax.axis_index("batch"), lax.axis_index("head")
  row = p.lines - 1 - lax.axis_index("line")
  line = stream.line(p, refs["table"], b, row)
  start = row * p.tile.rows
  queries = pl.ds(start, ROWS)
  kv = h if p.group == 1 else lax.div(h, jnp.int32(p.group))
  load = functools.partial(_copy, interpreted)

  def fetch(name, n):
    keys = pl.ds(line.nth(n) * p.tile.streamed, p.tile.streamed)
    columns = _columns(kv, smem[name].shape[2])
    load(refs[name].at[b, keys, columns], smem[name].at[0])

  columns = _columns(h, smem["q"].shape[2])
  load(refs["q"].at[b, queries, columns], smem["q"].at[0])
  pl.when(line.steps > 0)(lambda: fetch("k", 0))
  x = tile.View(p, refs, smem.get("p"), b, h)
  bounds = tile.of_queries(x, start, ROWS)
  step = functools.partial(
    _step, x, interpreted, smem, fetch, line, bounds, start
  )
  acc, m, l = stream.consume(
    line, step, (tile.zeros(ROWS, p.dims[-1]), *tile.nothing(x))
  )
  _wait(interpreted, 0)
  o, lse = tile.normalised(acc, m, l)
  plgpu.store(
    o_ref.at[b, queries, h], o.astype(o_ref.dtype), optimized=False
  )  # fmt: skip
  plgpu.store(lse_ref.at[b, h, queries], lse, optimized=False)


def _step(x, interpreted, smem, fetch, line, bounds, start, n, where, _, carry,
          masked):  # fmt: skip
  """Scores of one tile, their softmax, and the product with its values."""
  p = x.p
  # Addresses that may not be known before the loop: kept, they would spill.
  again = lax.optimization_barrier(jnp.int32(0))
  fetch("v", n)
  _wait(interpreted, 1)
  s = tile.zeros(*tile.shape(p))
  q, k_ref, v_ref = (smem[name].at[again] for name in "qkv")
  for at in range(0, p.dims[5], COLUMNS):
    # By parts, since operands are registers, too.
    part = slice(None), pl.ds(at, COLUMNS)
    keys = k_ref.at[part].transpose((1, 0))
    s = _dot(interpreted, s, _left(q.at[part]), _right(keys))
  # The last step fetches its own keys again: copies have no condition, and as
  # many must be under way in every step.
  fetch("k", jnp.minimum(n + 1, line.steps - 1))
  seen, drop = None, lambda y: y
  if masked or p.spec.dropout_rate:
    k = where()[1] * p.tile.streamed
    drop = tile.dropper(x, start, k)
  if masked:
    seen = tile.visible(x, bounds, tile.of_keys(x, k, p.tile.streamed), k)
  acc, m, l, e = tile.softmax(p, s, seen, carry)
  e = drop(e)
  if x.operand is None:
    left = _as_left(e, v_ref.dtype)
  else:
    x.operand[...] = e.astype(x.operand.dtype)
    left = [_left(x.operand)]
  _wait(interpreted, 1)
  size = p.tile.streamed // len(left)
  for i, part in enumerate(left):
    values = _right(v_ref.at[pl.ds(i * size, size)])
    acc = _dot(interpreted, acc, part, values)
  return acc, m, l


def _copy(interpreted, source, target) -> None:
  if interpreted:
    target[...] = source[...]
    return
  plgpu.copy_gmem_to_smem(
    source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS
  )


def _wait(interpreted, most: int) -> None:
  """Until at most so many copies are under way, the latest ones."""
  if not interpreted:
    plgpu.wait_gmem_to_smem(most)


def _dot(interpreted, acc, a, b):
  if interpreted:
    return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)
  return plgpu.mma(acc, a, b)


def _left(ref):
  return plgpu.load(ref, layout=plgpu.Layout.MMA_LHS(ref.dtype))


def _right(ref):
  return plgpu.load(ref, layout=plgpu.Layout.MMA_RHS(ref.dtype))


def _as_left(e: jax.Array, dtype: Any) -> list[jax.Array]:
  """Left operands [64, 16] out of an accumulator: rounded, in its registers."""
  left = plgpu.Layout.MMA_LHS(dtype)
  rows, columns = e.shape
  part = plgpu.ShapeDtypeStruct((rows, DEPTH), dtype, layout=left)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA,), return_type=[part] * (columns // DEPTH)
  )
  def rounded(_, values):
    values = values.astype(mgpu.utils.dtype_to_ir_type(dtype))
    layout = left.to_mgpu()
    shape = layout.registers_shape(part.shape)
    return [
      mgpu.FragmentedArray(
        _registers=values[:, at : at + DEPTH].registers.reshape(shape),
        _layout=layout,
        _is_signed=None,
      )
      for at in range(0, columns, DEPTH)
    ]

  return rounded(e)
