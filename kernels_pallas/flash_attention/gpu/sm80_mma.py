"""What the kernels for GPUs before Hopper are made of: `mma` and `cp.async`.

A block is one warpgroup, 64 rows of a head. What streams by has one buffer for
each of its two operands: while one is multiplied the other one's next tile
arrives (FlashAttention-2's order). That is little shared memory, and several
blocks a multiprocessor hide the rest. Nothing here has a barrier in memory:
those that other warpgroups could wait on are Hopper's; a copy waits for the
block's reads before it, and a wait for a copy is one for all threads.

The GPU interpreter has neither instruction: with `interpreted` a copy is an
assignment and a product a `jnp.dot`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.common import gpu_memory
from kernels_pallas.flash_attention.gpu import gpu_tile as tile
from kernels_pallas.flash_attention.gpu.gpu_problem import Problem
from kernels_pallas.flash_attention.gpu.gpu_tile_sizes import COLUMNS, ROWS

DEPTH = 16
"""Terms that one `mma` sums."""


def flat(p: Problem, names: tuple[str, ...]) -> dict[str, jax.Array]:
  """The problem's arrays, those named as [B, T, N H].

  `cp.async` takes a head only out of rows that are flat.
  """
  return {
    name: x.reshape(*x.shape[:2], -1) if name in names else x
    for name, x in p.arrays.items()
  }


def fetch(interpreted: bool, source: Any, target: Any, where: Any) -> None:
  """Starts the copy of a head's rows into shared memory.

  Args:
    interpreted: Whether to assign.
    source: [B, T, N H], flat.
    target: [1, rows, H].
    where: (row of the batch, first token, head).
  """
  b, start, head = where
  _, rows, size = target.shape
  target = _late(target)
  part = source.at[b, pl.ds(start, rows), pl.ds(head * size, size)]
  if interpreted:
    target[...] = part[...]
    return
  plgpu.copy_gmem_to_smem(
    part, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS
  )


def wait(interpreted: bool, most: int) -> None:
  """Until at most so many copies are under way, the latest ones."""
  if not interpreted:
    plgpu.wait_gmem_to_smem(most)


def again(smem: dict[str, Any], names: str | tuple[str, ...]) -> list[Any]:
  """Buffers [1, rows, n] without their first axis, for use in a loop."""
  return [_late(smem[name]) for name in names]


def scarce(p: Problem) -> bool:
  """Whether there are no registers for addresses that a loop does not change:
  with a mask, beside the sums of a wide head."""
  return bool(p.rows) and max(p.dims[5:]) > tile.WIDE


def late(x: tile.View) -> tile.View:
  """The view with a row and head that are not known before a loop, nor what is
  computed of them: addresses, and hashes."""
  b, h = lax.optimization_barrier((x.b, x.h))
  return x._replace(b=b, h=h)


def product(interpreted: bool, a: Any, b: Any) -> jax.Array:
  """a b^T of two references, [64, rows of b], in float32.

  Args:
    interpreted: Whether `mma` is not there.
    a: [64, H] in shared memory.
    b: [n, H] in shared memory.
  """
  found = tile.zeros(ROWS, b.shape[0])
  for at in range(0, a.shape[1], COLUMNS):
    # By parts, since operands are registers, too.
    part = slice(None), pl.ds(at, COLUMNS)
    right = _right(b.at[part].transpose((1, 0)))
    found = _dot(interpreted, found, _left(a.at[part]), right)
  return found


def accumulate(
  interpreted: bool, x: tile.View, acc: jax.Array, left: jax.Array, right: Any
) -> jax.Array:
  """acc + left right, left rounded to the type of `right`.

  Args:
    interpreted: Whether `mma` is not there.
    x: The view; without `operand`, left becomes an operand in its registers.
    acc: [64, n].
    left: [64, m], values.
    right: [m, n] in shared memory.
  """
  if x.operand is None:
    parts = _as_left(left, right.dtype)
  else:
    x.operand[...] = left.astype(x.operand.dtype)
    parts = [_left(x.operand)]
  size = left.shape[1] // len(parts)
  for i, part in enumerate(parts):
    rows = _right(right.at[pl.ds(i * size, size)])
    acc = _dot(interpreted, acc, part, rows)
  return acc


def store(value: jax.Array, out: Any) -> None:
  """Sums to memory, from registers."""
  gpu_memory.store(out, value.astype(out.dtype))


def _late(buffer: Any) -> Any:
  """[rows, n] of a buffer [1, rows, n], of which no address is known before a
  loop: the compiler would keep one for every instruction, and spill."""
  return buffer.at[lax.optimization_barrier(jnp.int32(0))]


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
