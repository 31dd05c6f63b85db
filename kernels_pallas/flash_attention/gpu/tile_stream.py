"""How tiles reach the warpgroups of a GPU kernel that compute.

One warpgroup issues the copies of the streamed side into its buffers; each
buffer has a barrier that says it is full, on which the others wait, and one
that says it is free, on which all of them arrive (FlashAttention-3, section
3.1). A line of the problem's table says which tiles: the visible ones first.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.gpu.gpu_problem import Problem
from kernels_pallas.flash_attention.gpu.gpu_tile_sizes import (
  REGISTERS,
  SHARED_BYTES,
)
from kernels_pallas.masks import intervals

GROUP = "group"
"""Name of the axis of warpgroups."""

ALIGNED = 1024
"""Bytes: Mosaic GPU starts each buffer of shared memory at a multiple."""

BARRIER_BYTES = 8
"""Of each barrier, which follow the buffers."""

Step = Callable[..., Any]
"""(n, where, slots, carry, masked) to the next carry: n counts over the line,
`where()` is (head, tile), slots are the operands' buffers."""


class Line(NamedTuple):
  """A line of the table: which tiles a block visits.

  Fields: p, the problem; table, reference; start of the line in it; full and
  partial, how many tiles there are of each class; heads, how often the line is
  walked, once for each query head; before, steps of the lines that the block
  took before this one.
  """

  p: Problem
  table: Any
  start: Any
  full: jax.Array
  partial: jax.Array
  heads: int
  before: Any = 0

  @property
  def steps(self) -> jax.Array:
    """Tiles that pass, over all heads."""
    return self.heads * (self.full + self.partial)

  def nth(self, n: Any) -> jax.Array:
    """The tile of step n of a line that is walked once."""
    return self.table[self.start + 2 + n]

  def at(self, n: jax.Array) -> tuple[Any, jax.Array]:
    """(head, tile) of step n of all, of either class."""
    if self.heads == 1:
      return 0, self.nth(n)
    full = n < self.heads * self.full
    count = jnp.where(full, self.full, self.partial)
    m = n - jnp.where(full, 0, self.heads * self.full)
    head = lax.div(m, count)
    return head, self.nth(jnp.where(full, 0, self.full) + m - head * count)

  def tile(self, kind: int, n: jax.Array) -> tuple[Any, jax.Array]:
    """(head, tile) of step n among those of a class."""
    count = self.full if kind == intervals.FULL else self.partial
    head, w = 0, n
    if self.heads > 1:
      head, w = lax.div(n, count), lax.rem(n, count)
    first = 0 if kind == intervals.FULL else self.full
    return head, self.table[self.start + 2 + first + w]


def line(
  p: Problem, table: Any, b: Any, row: Any, heads: int = 1, before: Any = 0
) -> Line:
  """The line of a batch row and a block of rows."""
  wide = p.wide + 2
  rows = table.shape[0] // (p.lines * wide)
  start = (row if rows == 1 else b * p.lines + row) * wide
  return Line(p, table, start, table[start], table[start + 1], heads, before)


def barriers(p: Problem, arrivals: tuple[int, ...]) -> list[Any]:
  """Types of the barriers: full ones, with their copies, then free ones."""
  t = p.tile
  full = [
    plgpu.Barrier(num_arrivals=n, num_barriers=stages)
    for n, stages in zip(arrivals, t.stages, strict=True)
  ]
  free = [
    plgpu.Barrier(num_arrivals=t.groups, num_barriers=stages)
    for stages in t.stages
  ]
  return [full, free]


def slots(a: Line, n: Any) -> tuple[jax.Array, ...]:
  """The buffers of both operands at step n of a line."""
  # Unsigned, whose remainder by a power of two is one instruction.
  n = jnp.int32(a.before + n).astype(jnp.uint32)
  return tuple(
    lax.rem(n, jnp.uint32(stages)).astype(jnp.int32)
    for stages in a.p.tile.stages
  )


def buffer(shape: tuple[int, ...], dtype: Any) -> Any:
  """Shared memory as `wgmma` and the copy engine want it: swizzled rows."""
  columns = 64 if shape[-1] % 64 == 0 else 32
  transforms = (
    plgpu.TilingTransform((8, columns)),
    plgpu.SwizzleTransform(2 * columns),
  )
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def shapes(
  p: Problem, stays: dict[str, int], passes: dict[str, int]
) -> dict[str, tuple[int, ...]]:
  """Of the buffers of what stays, one a warpgroup, and of what passes by.

  Args:
    p: The problem.
    stays: Columns by name.
    passes: Columns of the two operands.
  """
  t = p.tile
  found = {name: (t.groups, t.height, n) for name, n in stays.items()}
  for stages, (name, n) in zip(t.stages, passes.items(), strict=True):
    found[name] = stages, t.streamed, n
  return found


def taken(types: Any) -> int:
  """Bytes of shared memory that a tree of its types takes, barriers too."""
  size = 0
  for one in jax.tree.leaves(types):
    if isinstance(one, plgpu.Barrier):
      size += math.prod(one.get_ref_aval().shape) * BARRIER_BYTES
    else:
      found = math.prod(one.shape) * jnp.dtype(one.dtype).itemsize
      size += math.ceil(found / ALIGNED) * ALIGNED
  return size


def room(types: Any, more: int = 0) -> bool:
  """Whether shared memory holds all of it.

  Args:
    types: As of `taken`.
    more: Bytes that the compiler adds.
  """
  return taken(types) + more <= SHARED_BYTES


def check(p: Problem, types: Any, more: int = 0) -> None:
  """Raises ValueError where a tile does not fit.

  Args:
    p: The problem.
    types: As of `taken`.
    more: Bytes that the compiler adds.
  """
  size, (H, Hv) = taken(types) + more, p.dims[-2:]
  if size > SHARED_BYTES:
    raise ValueError(
      f"config: found {p.tile}, which at head dims {H} and {Hv} takes "
      f"{size:,} bytes of shared memory, expected at most {SHARED_BYTES:,}; "
      "pass fewer groups, a smaller streamed or fewer stages"
    )


def produce(a: Line, full: Any, free: Any, copies: tuple[Any, ...]) -> None:
  """Copies the tiles of a line, one after the other, as buffers get free.

  Args:
    a: The line.
    full: A barrier array for each of `copies`.
    free: Likewise.
    copies: Functions of (head, tile, slot, barrier).
  """

  def turn(kind, first, n, carry):
    head, tile = a.tile(kind, n)
    for i, slot in enumerate(slots(a, first + n)):

      @pl.when(a.before + first + n >= a.p.tile.stages[i])
      def _wait(i=i, slot=slot):
        plgpu.barrier_wait(free[i].at[slot])

      copies[i](head, tile, slot, full[i].at[slot])
    return carry

  for kind, first, count in _loops(a):
    lax.fori_loop(0, count, functools.partial(turn, kind, first), None)


def drain(p: Problem, free: Any, steps: Any) -> None:
  """Waits until all buffers are free, so that nothing arrives after the end.

  Args:
    p: The problem.
    free: As of `produce`.
    steps: How many tiles were copied.
  """

  def wait(barrier, slot, carry):
    plgpu.barrier_wait(barrier.at[slot])
    return carry

  for barrier, stages in zip(free, p.tile.stages, strict=True):
    slots = jnp.minimum(steps, stages)
    lax.fori_loop(0, slots, functools.partial(wait, barrier), None)


def of_keys(p: Problem, refs: Any, smem: Any, b: Any, h: Any) -> tuple:
  """Copies of k and v for query head h of a batch row, for `produce`."""
  kv = h if p.group == 1 else lax.div(h, jnp.int32(p.group))

  def operand(name):
    def run(_, j, slot, barrier):
      keys = pl.ds(j * p.tile.streamed, p.tile.streamed)
      plgpu.copy_gmem_to_smem(
        refs[name].at[b, keys, kv], smem[name].at[slot], barrier
      )

    return run

  return operand("k"), operand("v")


def of_queries(p: Problem, refs: Any, smem: Any, b: Any, h: Any) -> tuple:
  """Copies of q and do for key head h of a batch row, for `produce`.

  The statistics of the queries come with q.
  """

  def operand(name, *more):
    def run(head, i, slot, barrier):
      queries = pl.ds(i * p.tile.streamed, p.tile.streamed)
      n = h * p.group + head
      plgpu.copy_gmem_to_smem(
        refs[name].at[b, queries, n], smem[name].at[slot], barrier
      )
      for rows in more:
        plgpu.copy_gmem_to_smem(
          refs[rows].at[b, n, :, queries], smem[rows].at[slot], barrier
        )

    return run

  return operand("q", "stats"), operand("do")


def fetch(
  refs: Any, smem: Any, ready: Any, names: tuple[str, ...]
) -> Callable[[Any], None]:
  """What starts the copies of what stays, a `Place`'s rows, for `schedule.run`.

  Args:
    refs: Arrays by name.
    smem: Buffers by name, one a warpgroup.
    ready: A barrier a warpgroup, on which all copies arrive.
    names: Which arrays.
  """

  def run(at):
    for name in names:
      plgpu.copy_gmem_to_smem(
        refs[name].at[at.b, at.rows, at.h],
        smem[name].at[at.group],
        ready.at[at.group],
      )

  return run


def consume(a: Line, step: Step, carry: Any) -> Any:
  """Folds `step` over the tiles of a line.

  Args:
    a: The line.
    step: As of `Step`.
    carry: First carry.
  """

  def turn(kind, first, n, carry):
    where = functools.partial(a.tile, kind, n)
    masked = kind == intervals.PARTIAL
    return step(first + n, where, slots(a, first + n), carry, masked)

  for kind, first, count in _loops(a):
    carry = lax.fori_loop(0, count, functools.partial(turn, kind, first), carry)
  return carry


def estimate(p: Problem, matmuls: int) -> dict[str, Any]:
  """The cost of a kernel, as an argument of `plgpu.kernel` where it takes one.

  That of JAX 0.11 does not.
  """
  if "cost_estimate" not in inspect.signature(plgpu.kernel).parameters:
    return {}
  return {"cost_estimate": p.cost(matmuls)}


def roles(p: Problem, compute: Callable[[Any], None], copy) -> None:
  """Runs `compute(group)` in all warpgroups but the last, and `copy()` there.

  Registers move from the one that only copies to the others.
  """
  groups = p.tile.groups
  group = lax.axis_index(GROUP)
  many, few = REGISTERS.get(groups, (None, None))

  @pl.when(group < groups)
  def _compute():
    if many is not None:
      plgpu.set_max_registers(many, action="increase")
    compute(group)

  @pl.when(group == groups)
  def _copy():
    if few is not None:
      plgpu.set_max_registers(few, action="decrease")
    copy()


def _loops(a: Line):
  """(class, steps before, steps) of the loops over a line."""
  if intervals.FULL in a.p.kinds:
    yield intervals.FULL, 0, a.heads * a.full
  if intervals.PARTIAL in a.p.kinds:
    first = a.heads * a.full if intervals.FULL in a.p.kinds else 0
    yield intervals.PARTIAL, first, a.heads * a.partial
