"""Persistent kernels: which lines of work a block of threads takes, and how.

There is one block a multiprocessor, and each has a list of (head, batch row,
line of the table). While it finishes and stores one, what the next one needs is
on its way. As many key heads as the second-level cache holds are
worked on at a time (a tile reads too many bytes a FLOP for the memory beyond
it): a section, in which the longest lines come first. The list of a mask that
indices decide is dealt out before the program runs, each line to the block that
has the least to do (Graham 1969: at most 4/3 of the best where all heads are
one section, whose lines are sorted; else 2 - 1/m, for m blocks). One that data
decides is dealt in turns, forth and back.
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
from kernels_pallas.flash_attention.gpu.gpu_problem import KEYS, Problem

PROGRAM = "program"
"""Name of the axis of blocks of threads."""

CACHE = 32 << 20
"""Bytes of the streamed side that are worked on at a time, of Hopper's 50 MB:
keys and values, or queries and cotangents."""

BETWEEN = 0.5
"""What the change of lines takes beside a tile: a guess, to break ties."""

MANY = 1 << 16
"""Lines from which they are dealt in turns: all shares are about equal then."""


class Place(NamedTuple):
  """Where a warpgroup works.

  Fields: b, the batch row; h, the head, of keys where queries are streamed;
  start, its first row; group, which warpgroup of the block it is; size, how
  many rows it has.
  """

  b: jax.Array
  h: jax.Array
  start: jax.Array
  group: Any
  size: int

  @property
  def rows(self) -> Any:
    """Its rows."""
    return pl.ds(self.start, self.size)


class Share(NamedTuple):
  """What one block of threads has to do.

  Fields: p, the problem; table, reference; start of the block's list in it.
  """

  p: Problem
  table: Any
  start: Any

  @property
  def count(self) -> jax.Array:
    """How many lines there are."""
    return self.table[self.start]

  def at(self, i: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(batch row, head, line) of the i-th line of the list."""
    B, lines = jnp.int32(self.p.dims[0]), jnp.int32(self.p.lines)
    item = self.table[self.start + 1 + i]
    rest = lax.div(item, lines)
    head = lax.div(rest, B)
    return rest - head * B, head, item - rest * lines


def programs(p: Problem) -> int:
  """How many blocks of threads a kernel has."""
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
  """The results of a persistent kernel.

  Args:
    p: The problem, whose arrays and schedule are the kernel's first argument.
    kernel: Its body.
    scratch: Types of its memory and barriers.
    out: Types of its results.
    matmuls: A tile, as of `Problem.cost`.
    interpret: As of `plgpu.kernel`.
    name: What follows 'flash_attention_'.
  """
  run = plgpu.kernel(
    kernel,
    out_type=out,
    scratch_types=scratch,
    grid=(programs(p),),
    grid_names=(PROGRAM,),
    num_threads=p.tile.groups + 1,
    thread_name=stream.GROUP,
    compiler_params=plgpu.CompilerParams(approx_math=True),
    kernel_name=f"flash_attention_{name}",
    interpret=interpret,
    **stream.estimate(p, matmuls),
  )
  return run({**p.arrays, "schedule": deal(p)})


def run(
  p: Problem,
  refs: dict[str, Any],
  apart: bool,
  copy: Callable[[stream.Line, Any, Any], None],
  fetch: Callable[[Place], None],
  compute: Callable[[stream.Line, Place], Any],
  store: Callable[[Any, Place], None],
  drain: Callable[[Any], None] = lambda steps: None,
) -> None:
  """The body of a persistent kernel: all lines of this block of threads.

  Args:
    p: The problem.
    refs: Its arrays, the schedule included.
    apart: Whether results have shared memory of their own. Else they take the
      place of what stays, and the next line's waits for them to leave.
    copy: Streams the tiles of a line for (batch row, head), in one warpgroup.
    fetch: Starts the copies of what stays while a line is worked on.
    compute: Results of a line, in registers.
    store: Starts the copies of results to memory.
    drain: Called when all tiles are copied, with their number.
  """

  def mine():
    # Read anew where it is needed: over the loop registers are what is scarce.
    program = lax.optimization_barrier(lax.axis_index(PROGRAM))
    table = refs["schedule"]
    return Share(p, table, program * (table.shape[0] // programs(p)))

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
      return Place(b, h, row * p.tile.rows + group * size, group, size)

    def turn(carry):
      i, before = carry
      a, b, h, start = line(i, before)
      found = compute(a, Place(b, h, start + group * size, group, size))
      i, again = lax.optimization_barrier((i, group))

      def fetch_next():
        @pl.when(i + 1 < mine().count)
        def _fetch():
          fetch(place(i + 1, again))

      # What the line before left is long gone, but the wait is needed: with it
      # comes a barrier of the warpgroup, behind which all four warps have read
      # what stays (q, do, k, v) before one lane's copy overwrites it.
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

  stream.roles(p, compute_all, copy_all)


def deal(p: Problem) -> jax.Array:
  """The lists of all blocks, int32, flat and of one length.

  A list is: how many lines there are, the lines, padding.

  Args:
    p: The problem.
  """
  order, costs = _order(p)
  blocks = programs(p)
  if isinstance(costs, np.ndarray) and costs.size <= MANY:
    lists = _to_the_least_busy(order, costs, blocks)
  else:
    lists = _in_turns(order, blocks)
  return jnp.asarray(lists, jnp.int32).reshape(-1)


def _order(p: Problem) -> tuple[Any, Any]:
  """The lines of all heads in the order of work, and what each costs."""
  (B, _, K, T, S, H, Hv), heads = p.dims, p.heads
  tokens = S if p.streamed == KEYS else T * p.walks
  size = tokens * (H + Hv) * p.arrays["q"].dtype.itemsize
  at_once = max(1, CACHE // size)
  xp = np if isinstance(p.work, np.ndarray) else jnp
  # Axes: line, batch, head. Equal lines of all heads are neighbours.
  line, b, h = np.ogrid[: p.lines, :B, :heads]
  item = ((h * B + b) * p.lines + line).astype(np.int32)
  section = np.broadcast_to((b * K + h * K // heads) // at_once, item.shape)
  costs = p.walks * p.work.T[:, :, None]
  costs = xp.broadcast_to(costs, item.shape).reshape(-1)
  order = xp.lexsort((-costs, section.reshape(-1)))
  return xp.asarray(item.reshape(-1))[order], costs[order]


def _to_the_least_busy(order, costs, blocks: int) -> np.ndarray:
  heap, lists = [(0.0, n) for n in range(blocks)], [[] for _ in range(blocks)]
  for item, cost in zip(order.tolist(), costs.tolist(), strict=True):
    busy, n = heap[0]
    lists[n].append(item)
    heapq.heapreplace(heap, (busy + cost + BETWEEN, n))
  found = np.zeros((blocks, 1 + max(map(len, lists))), np.int32)
  for row, one in zip(found, lists, strict=True):
    row[: 1 + len(one)] = [len(one), *one]
  return found


def _in_turns(order, blocks: int) -> Any:
  xp = np if isinstance(order, np.ndarray) else jnp
  rounds = math.ceil(order.size / blocks)
  lists = xp.pad(
    order, (0, rounds * blocks - order.size), constant_values=-1
  ).reshape(rounds, blocks)
  back = np.arange(rounds)[:, None] % 2 == 1
  lists = xp.where(back, lists[:, ::-1], lists).T
  counts = (lists >= 0).sum(1, keepdims=True)
  return xp.concatenate([counts, lists], axis=1)
