"""Decode attention as a Mosaic TPU kernel: the mosaic_tpu backend.

Not yet run on a TPU: the interpreter checks numbers and races, libtpu's
compiler for v4 to tpu7x schedules and spills.

Decoding is bound by reading keys and values, so the kernel is built around
their copies. Pages stay in HBM; the blocks of all entries of a split form one
stream, in which the copy of a block starts before the previous block is
processed, across rows as well: no row waits for its first page. Splits are a
parallel grid axis, so that on chips with two cores each reads half of every
row. Page tables in scalar memory determine the next page.

Scores are rows of queries (M = tokens x G) by lanes of keys, which fills
registers although decoding has few rows.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels_pallas.decode_attention.pages import MAX_CODE
from kernels_pallas.decode_attention.tpu import key_block
from kernels_pallas.decode_attention.tpu.key_block import (
  NAMES,
  Entry,
  Plan,
  memory_dtypes,
  plan,
)
from kernels_pallas.decode_attention.work import Problem

VMEM_LIMIT = 100 * 2**20

TABLE_BYTES = 512 * 1024
"""Most scalar memory that tables may take, in bytes."""


def mosaic_tpu_decode(
  p: Problem, interpret: Any
) -> tuple[Float[Array, "E K M Hv"], Float[Array, "E K M"]]:
  """Returns the output and log-sum-exp of every entry, in float32.

  Args:
    p: The problem.
    interpret: None or False to compile, or as in `pl.pallas_call`.
  """
  x = plan(p)
  items, K, M, H = x.dims
  Hv, splits = x.width_v, p.splits
  # Queries are zero where the values lie next to the keys.
  pad = [(0, 0), (0, 0), (0, M - p.q.shape[2]), (0, H - p.q.shape[3])]
  q = jnp.pad(p.q, pad)
  storage = {name: getattr(p.storage, name) for name in x.names}
  entry = lambda s, i, *_: (s * items + i, 0, 0, 0)  # noqa: E731
  o, lse = pl.pallas_call(
    functools.partial(_kernel, x),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(splits, items),
      in_specs=[
        pl.BlockSpec((None, K, M, H), lambda s, i, *_: (i, 0, 0, 0)),
        {name: pl.BlockSpec(memory_space=pl.ANY) for name in storage},
      ],
      out_specs=[
        pl.BlockSpec((None, K, M, Hv), entry),
        pl.BlockSpec((None, K, 1, M), entry),
      ],
      scratch_shapes=[
        {
          name: pltpu.VMEM((2, *x.shapes[name]), storage[name].dtype)
          for name in x.names
        },
        pltpu.SemaphoreType.DMA((2, len(x.names))),
        pltpu.VMEM((K, M, 1), jnp.float32),
        pltpu.VMEM((K, M, 1), jnp.float32),
        pltpu.VMEM((K, M, Hv), jnp.float32),
      ],
    ),
    out_shape=[
      key_block.varying(q, (splits * items, K, M, Hv)),
      key_block.varying(q, (splits * items, K, 1, M)),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
      vmem_limit_bytes=VMEM_LIMIT,
    ),
    cost_estimate=_cost(p),
    interpret=interpret or False,
    name="decode_attention",
  )(_table(p), _entries(p, items), q, storage)
  rows = p.q.shape[2]
  return o[:, :, :rows, -p.heads[2] :], lse[:, :, 0, :rows]


def _kernel(x: Plan, table, entries, q, storage, o, lse, buffers, sems, *state):
  items = x.dims[0]
  split, item = pl.program_id(0), pl.program_id(1)
  here = Entry(entries, split * items + item)
  stream = functools.partial(_transfer, x, table, storage, buffers, sems)
  m, l, acc = state
  # Finite, so that differences from it are never NaN.
  m[...] = jnp.full(m.shape, jnp.finfo(m.dtype).min, m.dtype)
  l[...] = jnp.zeros(l.shape, l.dtype)
  acc[...] = jnp.zeros(acc.shape, acc.dtype)

  @pl.when(here["first"] == 1)
  def _():
    stream(here, here["start"], here["slot"], "start")

  def block(n, carry):
    slot = jax.lax.rem(here["slot"] + n - here["start"], np.int32(2))
    last = n + 1 == here["stop"]
    following = here["next"]

    @pl.when(jnp.logical_not(last))
    def _():
      stream(here, n + 1, 1 - slot, "start")

    @pl.when(last & (following < items))
    def _():
      there = Entry(entries, split * items + following)
      stream(there, there["start"], 1 - slot, "start")

    stream(here, n, slot, "wait")
    key_block.attend(x, here, n, q, {k: r.at[slot] for k, r in buffers.items()},
                  (m, l, acc))  # fmt: skip
    return carry

  jax.lax.fori_loop(here["start"], here["stop"], block, 0)
  total = l[...]
  empty = total == 0
  total = jnp.where(empty, 1, total)
  o[...] = acc[...] / total
  found = m[...] * math.log(2) + jnp.log(total)
  key_block.store_rows(lse, jnp.where(empty, -jnp.inf, found))


def _transfer(x, table, storage, buffers, sems, entry: Entry, n, slot, what):
  """Starts or awaits the copies of block n of an entry into a slot."""
  row, first = entry["row"], key_block.first_key(x, entry, n)

  def copy(name, source, target):
    at = sems.at[slot, x.names.index(name)]
    getattr(pltpu.make_async_copy(source, target, at), what)()

  if x.pages == 0:
    for name in x.names:
      source = storage[name].at[row, :, pl.ds(first, x.block)]
      copy(name, source, buffers[name].at[slot, 0])
    return
  page = jax.lax.div(first, np.int32(x.unit))
  end = jax.lax.div(entry["high"] + x.unit - 1, np.int32(x.unit))

  def one(j, carry):
    found = table[row * x.pages + page + j]
    for name in x.names:
      copy(name, storage[name].at[found], buffers[name].at[slot, j])
    return carry

  # Pages after the last visible one are not read.
  count = jnp.minimum(end - page, x.block // x.unit)
  jax.lax.fori_loop(0, count, one, 0)


def _table(p: Problem) -> jax.Array:
  """Returns the table flat: rows would be padded to 128 in scalar memory."""
  if p.table is None:
    return jnp.zeros(1, jnp.int32)
  return p.table.reshape(-1)


def _entries(p: Problem, items: int) -> jax.Array:
  """Returns the fields of all entries, `[fields x E]`.

  The blocks of a split are numbered consecutively, and alternate between two
  slots.
  """
  fields = {f.name: getattr(p.work, f.name) for f in dataclasses.fields(p.work)}
  count = (p.work.stop - p.work.start).reshape(p.splits, items)
  before = jnp.cumsum(count, axis=1) - count
  busy = jnp.where(count > 0, jnp.arange(items), items)
  after = jax.lax.cummin(busy, axis=1, reverse=True)[:, 1:]
  fields |= {
    "slot": before % 2,
    "first": (before == 0) & (count > 0),
    "next": jnp.pad(after, [(0, 0), (0, 1)], constant_values=items),
  }
  columns = [fields[name].reshape(-1) for name in NAMES]
  return jnp.stack(columns).astype(jnp.int32).reshape(-1)


def _cost(p: Problem) -> pl.CostEstimate:
  """Returns an upper bound: the cost of rows of full length."""
  items, _, M, _ = p.q.shape
  (_, H, Hv), keys = p.heads, items * p.heads[0] * p.capacity
  memory = jax.tree.leaves(p.storage) if p.table is not None else [p.storage.k]
  return pl.CostEstimate(
    flops=2 * keys * M * (H + Hv),
    transcendentals=keys * M,
    bytes_accessed=keys * (H + Hv) * memory[0].dtype.itemsize
    + 2 * p.q.size * 4,
  )


def check_for_tpu(p: Problem, interpret: Any) -> None:
  """Raises ValueError for calls that no TPU supports, unless interpreted."""
  if p.q.dtype == jnp.float64:
    raise ValueError("mosaic_tpu: found float64, expected bfloat16 or float32")
  if interpret:
    return
  if p.q.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(
      f"mosaic_tpu: found {p.q.dtype}, expected bfloat16 or float32, which are "
      "what TPUs compute in"
    )
  for dtype in memory_dtypes(p):
    # Scales are in lanes; otherwise a register row holds 32 bits per lane.
    multiple = 128 if dtype in MAX_CODE else 32 // dtype.itemsize
    if p.storage.size % multiple or p.block % multiple:
      raise ValueError(
        f"mosaic_tpu: found {p.storage.size} tokens a page in blocks of "
        f"{p.block}, expected multiples of {multiple} in {dtype}"
      )
  tables = 4 * len(NAMES) * p.work.row.size
  tables += 0 if p.table is None else 4 * p.table.size
  if tables > TABLE_BYTES:
    raise ValueError(
      f"mosaic_tpu: found {tables} bytes of page table and work list, expected "
      f"at most {TABLE_BYTES}; use larger pages, or fewer rows a call"
    )
