"""Streaming of tiles through shared memory: producer and consumer warpgroups.

One warpgroup issues the copies of the streamed side into its buffers. Each
buffer has a full barrier, on which the computing warpgroups wait, and a free
barrier, on which all of them arrive (FlashAttention-3, section 3.1). A line of
the problem's table lists the tiles, fully visible ones first.
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

from kernels_pallas.flash_attention.gpu.problem import Problem
from kernels_pallas.flash_attention.gpu.tile_sizes import (
  REGISTERS,
  SHARED_BYTES,
)
from kernels_pallas.masks import intervals

GROUP = "group"
"""Name of the axis of warpgroups."""

ALIGNMENT = 1024
"""Alignment in bytes of shared memory buffers in Mosaic GPU."""

BARRIER_BYTES = 8
"""Bytes per barrier; barriers follow the buffers."""

Step = Callable[..., Any]
"""Maps (n, where, slots, carry, masked) to the next carry: n counts steps of
the line, `where()` returns (head, tile), slots are the operands' buffers."""


class Line(NamedTuple):
  """A line of the table: the tiles that a block visits.

  Fields: p, the problem; table, reference; start of the line in it; full and
  partial, number of tiles of each class; heads, how often the line is
  traversed, once per query head; before, steps of the block's earlier lines.
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
    """Tiles to stream, over all heads."""
    return self.heads * (self.full + self.partial)

  def nth(self, n: Any) -> jax.Array:
    """Returns the tile of step n of a line that is traversed once."""
    return self.table[self.start + 2 + n]

  def at(self, n: jax.Array) -> tuple[Any, jax.Array]:
    """Returns (head, tile) of step n, over both classes."""
    if self.heads == 1:
      return 0, self.nth(n)
    full = n < self.heads * self.full
    count = jnp.where(full, self.full, self.partial)
    m = n - jnp.where(full, 0, self.heads * self.full)
    head = lax.div(m, count)
    return head, self.nth(jnp.where(full, 0, self.full) + m - head * count)

  def tile(self, kind: int, n: jax.Array) -> tuple[Any, jax.Array]:
    """Returns (head, tile) of step n among those of a class."""
    count = self.full if kind == intervals.FULL else self.partial
    head, w = 0, n
    if self.heads > 1:
      head, w = lax.div(n, count), lax.rem(n, count)
    first = 0 if kind == intervals.FULL else self.full
    return head, self.table[self.start + 2 + first + w]


def line(
  p: Problem, table: Any, b: Any, row: Any, heads: int = 1, before: Any = 0
) -> Line:
  """Returns the line of a batch row and a block of rows."""
  wide = p.wide + 2
  rows = table.shape[0] // (p.lines * wide)
  start = (row if rows == 1 else b * p.lines + row) * wide
  return Line(p, table, start, table[start], table[start + 1], heads, before)


def barriers(p: Problem, arrivals: tuple[int, ...]) -> list[Any]:
  """Types of the barriers: the full ones, then the free ones."""
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
  """Returns the buffers of both operands at step n of a line."""
  # Unsigned: its remainder by a power of two is a single instruction.
  n = jnp.int32(a.before + n).astype(jnp.uint32)
  return tuple(
    lax.rem(n, jnp.uint32(stages)).astype(jnp.int32)
    for stages in a.p.tile.stages
  )


def buffer(shape: tuple[int, ...], dtype: Any) -> Any:
  """Shared memory as `wgmma` and the copy engine need it: swizzled rows."""
  columns = 64 if shape[-1] % 64 == 0 else 32
  transforms = (
    plgpu.TilingTransform((8, columns)),
    plgpu.SwizzleTransform(2 * columns),
  )
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def buffer_shapes(
  p: Problem, stays: dict[str, int], passes: dict[str, int]
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of stationary buffers, one a warpgroup, and streamed
  ones.

  Args:
    p: The problem.
    stays: Columns of the stationary operands, by name.
    passes: Columns of the two streamed operands, by name.
  """
  t = p.tile
  found = {name: (t.groups, t.height, n) for name, n in stays.items()}
  for stages, (name, n) in zip(t.stages, passes.items(), strict=True):
    found[name] = stages, t.streamed, n
  return found


def shared_bytes(types: Any) -> int:
  """Returns the bytes of shared memory of a tree of types, with barriers."""
  size = 0
  for one in jax.tree.leaves(types):
    if isinstance(one, plgpu.Barrier):
      size += math.prod(one.get_ref_aval().shape) * BARRIER_BYTES
    else:
      found = math.prod(one.shape) * jnp.dtype(one.dtype).itemsize
      size += math.ceil(found / ALIGNMENT) * ALIGNMENT
  return size


def fits_shared(types: Any, more: int = 0) -> bool:
  """Whether the types fit into shared memory.

  Args:
    types: As in `shared_bytes`.
    more: Bytes that the compiler adds.
  """
  return shared_bytes(types) + more <= SHARED_BYTES


def check(p: Problem, types: Any, more: int = 0) -> None:
  """Raises ValueError if a tile does not fit into shared memory.

  Args:
    p: The problem.
    types: As in `shared_bytes`.
    more: Bytes that the compiler adds.
  """
  size, (H, Hv) = shared_bytes(types) + more, p.dims[-2:]
  if size > SHARED_BYTES:
    raise ValueError(
      f"config: found {p.tile}, which at head dims {H} and {Hv} takes "
      f"{size:,} bytes of shared memory, expected at most {SHARED_BYTES:,}; "
      "pass fewer groups, a smaller streamed or fewer stages"
    )


def produce(a: Line, full: Any, free: Any, copies: tuple[Any, ...]) -> None:
  """Copies the tiles of a line in order, as buffers become free.

  Args:
    a: The line.
    full: A barrier array for each of `copies`.
    free: A barrier array for each of `copies`.
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
    free: As in `produce`.
    steps: Number of tiles copied.
  """

  def wait(barrier, slot, carry):
    plgpu.barrier_wait(barrier.at[slot])
    return carry

  for barrier, stages in zip(free, p.tile.stages, strict=True):
    slots = jnp.minimum(steps, stages)
    lax.fori_loop(0, slots, functools.partial(wait, barrier), None)


def key_copies(p: Problem, refs: Any, smem: Any, b: Any, h: Any) -> tuple:
  """Returns the copies of k and v for a query head h, for `produce`."""
  kv = h if p.group == 1 else lax.div(h, jnp.int32(p.group))

  def operand(name):
    def run(_, j, slot, barrier):
      keys = pl.ds(j * p.tile.streamed, p.tile.streamed)
      plgpu.copy_gmem_to_smem(
        refs[name].at[b, keys, kv], smem[name].at[slot], barrier
      )

    return run

  return operand("k"), operand("v")


def query_copies(p: Problem, refs: Any, smem: Any, b: Any, h: Any) -> tuple:
  """Returns the copies of q and do for a key head h, for `produce`.

  The statistics of the queries are copied with q.
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
  """Returns a function that copies stationary operands, for `schedule.run`.

  Args:
    refs: Arrays by name.
    smem: Buffers by name, one per warpgroup.
    ready: A barrier per warpgroup, on which all copies arrive.
    names: Which arrays to copy.
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
    step: As in `Step`.
    carry: Initial carry.
  """

  def turn(kind, first, n, carry):
    where = functools.partial(a.tile, kind, n)
    masked = kind == intervals.PARTIAL
    return step(first + n, where, slots(a, first + n), carry, masked)

  for kind, first, count in _loops(a):
    carry = lax.fori_loop(0, count, functools.partial(turn, kind, first), carry)
  return carry


def cost_estimate(p: Problem, matmuls: int) -> dict[str, Any]:
  """Returns the cost estimate as an argument of `plgpu.kernel`.

  Empty for JAX 0.11, which has no such argument.
  """
  if "cost_estimate" not in inspect.signature(plgpu.kernel).parameters:
    return {}
  return {"cost_estimate": p.cost(matmuls)}


def specialise_warpgroups(
  p: Problem, compute: Callable[[Any], None], copy
) -> None:
  """Runs `compute(group)` in all warpgroups but the last, and `copy()` there.

  Registers are reallocated from the copying warpgroup to the others.
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
  """Yields (class, steps before, steps) of the loops over a line."""
  if intervals.FULL in a.p.kinds:
    yield intervals.FULL, 0, a.heads * a.full
  if intervals.PARTIAL in a.p.kinds:
    first = a.heads * a.full if intervals.FULL in a.p.kinds else 0
    yield intervals.PARTIAL, first, a.heads * a.partial
