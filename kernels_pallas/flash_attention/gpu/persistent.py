"""Persistent kernels: scheduling of work over blocks of threads, and their
loop.

There is one block per multiprocessor, and each has a list of lines, (head,
batch row, line of the table). While a block finishes and stores one line, the
operands of the next one are being copied. Only as many key heads as fit into
the L2 cache are processed at a time, since a tile reads too many bytes per FLOP
for main memory: these form a section, whose longest lines come first. If the
mask depends on indices alone, lines are assigned before the program runs, each
to the least loaded block (Graham 1969: at most 4/3 of the optimum if all heads
are one section, whose lines are sorted; else 2 - 1/m, for m blocks). If it
depends on data, lines are dealt in boustrophedon order.
"""

import heapq
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.gpu import tile_stream as stream
from kernels_pallas.flash_attention.gpu.problem import KEYS, Problem

PROGRAM = "program"
"""Name of the grid axis of blocks of threads."""

L2_BYTES = 32 << 20
"""Bytes of the streamed side (keys and values, or queries and cotangents) that
are processed at a time, of Hopper's 50 MB of L2 cache."""

LINE_OVERHEAD = 0.5
"""Cost of changing lines, in tiles: an estimate, to break ties."""

MAX_BALANCED_LINES = 1 << 16
"""Lines above which they are dealt in turns: loads are about equal then."""


class WarpgroupRows(NamedTuple):
  """The rows that a warpgroup works on.

  Fields: b, the batch row; h, the head (a key head if queries are streamed);
  start, the first row; group, index of the warpgroup in its block; size, number
  of rows.
  """

  b: jax.Array
  h: jax.Array
  start: jax.Array
  group: Any
  size: int

  @property
  def rows(self) -> Any:
    """The rows, as an index."""
    return pl.ds(self.start, self.size)


class WorkList(NamedTuple):
  """The list of lines of one block of threads.

  Fields: p, the problem; table, reference to all lists; start, offset of the
  block's list.
  """

  p: Problem
  table: Any
  start: Any

  @property
  def count(self) -> jax.Array:
    """Number of lines."""
    return self.table[self.start]

  def at(self, i: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (batch row, head, line) of the i-th line of the list."""
    B, lines = jnp.int32(self.p.dims[0]), jnp.int32(self.p.lines)
    item = self.table[self.start + 1 + i]
    rest = lax.div(item, lines)
    head = lax.div(rest, B)
    return rest - head * B, head, item - rest * lines


def num_blocks(p: Problem) -> int:
  """Returns the number of blocks of threads of a kernel."""
  return min(p.spec.blocks.programs, p.dims[0] * p.heads * p.lines)


def call(
  p: Problem,
  kernel: Callable[..., None],
  scratch: list[Any],
  out: list[Any],
  matmuls: int,
  interpret: Any,
  name: str,
) -> Any:
  """Runs a persistent kernel and returns its results.

  Args:
    p: The problem; its arrays and schedule are the kernel's first argument.
    kernel: The kernel's body.
    scratch: Types of its shared memory and barriers.
    out: Types of its results.
    matmuls: Matmuls per tile, as in `Problem.cost`.
    interpret: As in `plgpu.kernel`.
    name: Kernel name, after 'flash_attention_'.
  """
  run = plgpu.kernel(
    kernel,
    out_type=out,
    scratch_types=scratch,
    grid=(num_blocks(p),),
    grid_names=(PROGRAM,),
    num_threads=p.tile.groups + 1,
    thread_name=stream.GROUP,
    compiler_params=plgpu.CompilerParams(approx_math=True),
    kernel_name=f"flash_attention_{name}",
    interpret=interpret,
    **stream.cost_estimate(p, matmuls),
  )
  return run({**p.arrays, "schedule": assign_lines(p)})


def run(
  p: Problem,
  refs: dict[str, Any],
  apart: bool,
  copy: Callable[[stream.Line, Any, Any], None],
  fetch: Callable[[WarpgroupRows], None],
  compute: Callable[[stream.Line, WarpgroupRows], Any],
  store: Callable[[Any, WarpgroupRows], None],
  drain: Callable[[Any], None] = lambda steps: None,
) -> None:
  """The body of a persistent kernel: processes all lines of this block.

  Args:
    p: The problem.
    refs: Its arrays, including the schedule.
    apart: Whether results have their own shared memory. Otherwise they reuse
      the stationary operand's, and the next line's copy waits for their store.
    copy: Streams a line's tiles for (batch row, head), in one warpgroup.
    fetch: Starts the copies of a line's stationary operands.
    compute: Returns a line's results, in registers.
    store: Starts the stores of results to memory.
    drain: Called with the number of tiles when all are copied.
  """

  def mine():
    # Reloaded where it is needed: registers are scarce across the loop.
    program = lax.optimization_barrier(lax.axis_index(PROGRAM))
    table = refs["schedule"]
    return WorkList(p, table, program * (table.shape[0] // num_blocks(p)))

  def line(i, before):
    b, h, row = mine().at(i)
    a = stream.line(p, refs["table"], b, row, p.walks, before)
    return a, b, h, row * p.tile.rows

  def copy_all():
    def turn(i, before):
      a, b, h, _ = line(i, before)
      copy(a, b, h)
      return before + a.steps

    drain(lax.fori_loop(0, mine().count, turn, jnp.int32(0)))

  size = p.tile.height

  def compute_all(group):
    def place(i, group):
      b, h, row = mine().at(i)
      return WarpgroupRows(b, h, row * p.tile.rows + group * size, group, size)

    def turn(carry):
      i, before = carry
      a, b, h, start = line(i, before)
      found = compute(a, WarpgroupRows(b, h, start + group * size, group, size))
      i, again = lax.optimization_barrier((i, group))

      def fetch_next():
        @pl.when(i + 1 < mine().count)
        def _fetch():
          fetch(place(i + 1, again))

      # The previous line's stores are long done, but the wait includes a
      # barrier of the warpgroup: all four warps have read the stationary
      # operands (q, do, k, v) before one lane's copy overwrites them.
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      if apart:
        fetch_next()
      store(found, place(i, again))
      if not apart:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        fetch_next()
      return i + 1, before + a.steps

    fetch(place(0, group))
    lax.while_loop(
      lambda carry: carry[0] < mine().count, turn, (jnp.int32(0), jnp.int32(0))
    )
    plgpu.wait_smem_to_gmem(0)

  stream.specialise_warpgroups(p, compute_all, copy_all)


def assign_lines(p: Problem) -> jax.Array:
  """Returns the lists of all blocks, int32, flattened, of equal lengths.

  A list is: number of lines, the lines, padding.

  Args:
    p: The problem.
  """
  order, costs = _order(p)
  blocks = num_blocks(p)
  if isinstance(costs, np.ndarray) and costs.size <= MAX_BALANCED_LINES:
    lists = _to_least_loaded(order, costs, blocks)
  else:
    lists = _round_robin(order, blocks)
  return jnp.asarray(lists, jnp.int32).reshape(-1)


def _order(p: Problem) -> tuple[Any, Any]:
  """Returns the lines of all heads in scheduling order, and their costs."""
  (B, _, K, T, S, H, Hv), heads = p.dims, p.heads
  tokens = S if p.streamed == KEYS else T * p.walks
  size = tokens * (H + Hv) * p.arrays["q"].dtype.itemsize
  at_once = max(1, L2_BYTES // size)
  xp = np if isinstance(p.work, np.ndarray) else jnp
  # Axes: line, batch, head. The same line of all heads is contiguous.
  line, b, h = np.ogrid[: p.lines, :B, :heads]
  item = ((h * B + b) * p.lines + line).astype(np.int32)
  section = np.broadcast_to((b * K + h * K // heads) // at_once, item.shape)
  costs = p.walks * p.work.T[:, :, None]
  costs = xp.broadcast_to(costs, item.shape).reshape(-1)
  order = xp.lexsort((-costs, section.reshape(-1)))
  return xp.asarray(item.reshape(-1))[order], costs[order]


def _to_least_loaded(order, costs, blocks: int) -> np.ndarray:
  heap, lists = [(0.0, n) for n in range(blocks)], [[] for _ in range(blocks)]
  for item, cost in zip(order.tolist(), costs.tolist(), strict=True):
    busy, n = heap[0]
    lists[n].append(item)
    heapq.heapreplace(heap, (busy + cost + LINE_OVERHEAD, n))
  found = np.zeros((blocks, 1 + max(map(len, lists))), np.int32)
  for row, one in zip(found, lists, strict=True):
    row[: 1 + len(one)] = [len(one), *one]
  return found


def _round_robin(order, blocks: int) -> Any:
  xp = np if isinstance(order, np.ndarray) else jnp
  rounds = math.ceil(order.size / blocks)
  lists = xp.pad(
    order, (0, rounds * blocks - order.size), constant_values=-1
  ).reshape(rounds, blocks)
  back = np.arange(rounds)[:, None] % 2 == 1
  lists = xp.where(back, lists[:, ::-1], lists).T
  counts = (lists >= 0).sum(1, keepdims=True)
  return xp.concatenate([counts, lists], axis=1)
