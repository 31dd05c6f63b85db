"""How keys and values reach the GPU kernel: rows by `cp.async`, 16 bytes each.

A copy says for each row where it lies, so that a tile is any run of tokens,
of a cache or of pages, and whether it is read at all: rows outside the range
are filled with zeros in shared memory and cost no bytes of the GPU's memory.
What lies there, NaN included, then reaches nothing. Pallas' own copies are
`cp.async` before Hopper and need a barrier in memory from Hopper on; these are
the same instruction on all of them.

The GPU interpreter has neither: with `interpreted` a copy is an assignment.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, nvvm

CHUNK = 16
"""Bytes that a thread copies at a time."""

THREADS = 128
SWIZZLE, COLUMNS = 128, 64
LINES = SWIZZLE // CHUNK
"""Rows of a swizzled tile, and chunks of each of them."""

TRANSFORMS = (
  plgpu.TilingTransform((LINES, COLUMNS)),
  plgpu.SwizzleTransform(SWIZZLE),
)
"""Of shared memory that holds rows of 16-bit numbers."""


@dataclasses.dataclass(frozen=True)
class Source:
  """Where the tokens of a row lie in an array of rows, `[lines, columns]`.

  Token t of a row lies in line `(place * stride + head) * size + t % size`,
  where place is entry `row * width + t // size` of the table; or, without a
  table, in line `row * size + t`, and the head in its columns.

  Attributes:
    size: Tokens of a page, or of a row's cache.
    width: Pages of a row in the table, or None without one.
    stride: Key heads.
  """

  size: int
  width: int | None
  stride: int


def buffer(shape: tuple[int, ...], dtype: Any) -> Any:
  """Shared memory for rows of 16-bit numbers."""
  return plgpu.SMEM(shape, dtype, transforms=TRANSFORMS)


def fetch(
  interpreted: bool,
  x: Source,
  table: Any,
  copies: list[tuple[Any, Any, Any]],
  where: tuple[Any, ...],
) -> None:
  """Starts copies of a tile's rows; `commit` ends a group of them.

  Args:
    interpreted: Whether to assign.
    x: Where tokens lie.
    table: Reference, which may be anything where none is needed.
    copies: Of each the array of rows, the first of its columns to copy, and
      [tile, n] in shared memory.
    where: (row, head, first token, begin, end): tokens outside [begin, end)
      are zeros.
  """
  if interpreted:
    for lines, column, target in copies:
      _assign(x, table, lines, column, target, where)
    return
  scalar = plgpu.Layout.WG_SPLAT(())
  one = plgpu.RefType(), scalar, plgpu.RefType(TRANSFORMS)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), [one] * len(copies), [scalar] * len(where))
  )
  def copy(_, table, copies, where):
    _copy(x, table, copies, [s.registers.item() for s in where])

  each = [(a, jnp.int32(n), b) for a, n, b in copies]
  copy(table, each, [jnp.int32(n) for n in where])


def commit(interpreted: bool) -> None:
  """Makes the copies since the last one a group, which may be empty."""
  if interpreted:
    return

  @plgpu.inline_mgpu()
  def run(_):
    nvvm.cp_async_commit_group()

  run()


def wait(interpreted: bool, most: int) -> None:
  """Until at most so many groups are under way, for all threads.

  What any of them read before is no longer needed by it.
  """
  if interpreted:
    return

  @plgpu.inline_mgpu()
  def run(_):
    nvvm.cp_async_wait_group(most)
    mgpu.utils.warpgroup_barrier()

  run()


def meet(interpreted: bool) -> None:
  """What any thread stored in shared memory is there for all of them.

  Without the fence of `commit_smem`, which Ampere does not have.
  """
  if interpreted:
    return

  @plgpu.inline_mgpu()
  def run(_):
    mgpu.utils.warpgroup_barrier()

  run()


def part(interpreted: bool, parts: int) -> Any:
  """Which part of a tile is this warp's."""
  if interpreted:
    return 0
  scalar = plgpu.Layout.WG_SPLAT(())

  @plgpu.inline_mgpu(
    return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=scalar)
  )
  def run(_):
    index = mgpu.utils.warp_idx(sync=True)
    index = arith.remui(index, _i32(parts))
    return mgpu.FragmentedArray.splat(index, (), scalar.to_mgpu(),
                                      is_signed=True)  # fmt: skip

  return run()


def _copy(x: Source, table, copies, where):
  """The instructions of a thread: rows, then of each the chunks of copies."""
  row, head, first, begin, end = where
  shapes = [ir.MemRefType(into.type).shape[-4:] for _, _, into in copies]
  tile, across = (
    shapes[0][0] * LINES,
    [wide * LINES for _, wide, _, _ in shapes],
  )
  thread = arith.remui(mgpu.utils.thread_idx(), _i32(THREADS))
  last = arith.maxsi(arith.subi(end, _i32(1)), _i32(0))

  def page(token):
    place = _add(_mul(row, x.width), arith.divui(token, _i32(x.size)))
    place = arith.index_cast(ir.IndexType.get(), place)
    return _mul(memref.load(table, [place]), x.stride)

  once = None
  if x.width is not None and x.size % tile == 0:
    # A tile begins at a multiple of itself: no page ends within it.
    once = page(arith.minsi(first, last))

  def line(token):
    if x.width is None:
      return _add(_mul(row, x.size), token)
    place = page(token) if once is None else once
    at = arith.remui(token, _i32(x.size))
    return _add(_mul(_add(place, head), x.size), at)

  starts = [
    _start(*one, thread, n) for one, n in zip(copies, across, strict=True)
  ]
  for n in range(tile * max(across) // THREADS):
    found = None
    for one, wide in zip(starts, across, strict=True):
      if n >= tile * wide // THREADS:
        continue
      if found is None or wide != across[0]:
        r = arith.divui(_add(thread, _i32(n * THREADS)), _i32(wide))
        token = _add(first, r)
        inside = arith.andi(
          arith.cmpi(arith.CmpIPredicate.sge, token, begin),
          arith.cmpi(arith.CmpIPredicate.slt, token, end),
        )
        # A row that is not read has the address of one that is.
        found = line(arith.select(inside, token, last))
        read = arith.select(inside, _i32(CHUNK), _i32(0))
      _issue(one, found, r, read)


def _start(lines, column, into, thread, across):
  """Of a thread's copies: addresses, bytes of a line, its chunk, tiles."""
  i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
  space = llvm.PointerType.get(address_space=1)
  source = llvm.addrspacecast(space, mgpu.utils.memref_ptr(lines))
  # THREADS is a multiple of a row's chunks: a thread copies one column.
  chunk = arith.remui(thread, _i32(across))
  offset = _add(_mul(column.registers.item(), 2), _mul(chunk, CHUNK))
  source = arith.addi(
    llvm.ptrtoint(i64, source), arith.extui(i64, offset)
  )  # fmt: skip
  target = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(into))
  width = ir.MemRefType(lines.type).shape[1] * 2
  return source, target, width, chunk, across // LINES


def _issue(one, line, r, read):
  """One instruction: 16 bytes of a line to row r of a tile."""
  source, target, width, chunk, wide = one
  i64 = ir.IntegerType.get_signless(64)
  offset = arith.muli(arith.extui(i64, line), arith.constant(i64, width))
  inner, outer = arith.remui(r, _i32(LINES)), arith.divui(r, _i32(LINES))
  block = _add(_mul(outer, wide), arith.divui(chunk, _i32(LINES)))
  place = arith.xori(arith.remui(chunk, _i32(LINES)), inner)
  at = _add(_mul(block, LINES), inner)
  at = _add(_mul(at, SWIZZLE), _mul(place, CHUNK))
  llvm.inline_asm(
    ir.Type.parse("!llvm.void"),
    [_add(target, at), arith.addi(source, offset), read],
    "cp.async.cg.shared.global [$0], [$1], 16, $2;",
    "r,l,r,~{memory}",
    has_side_effects=True,
  )


def _assign(x: Source, table, lines, column, target, where):
  """The copy as the interpreter runs it."""
  row, head, first, begin, end = where
  tile, n = target.shape
  # Runs of rows that lie together; those that are not read are any others.
  found, step = [], tile if x.width is None else math.gcd(tile, x.size)
  for at in range(0, tile, step):
    line = row * x.size + first + at
    if x.width is not None:
      token = jnp.minimum(first + at, jnp.maximum(end - 1, 0))
      place = table[row * x.width + lax.div(token, jnp.int32(x.size))]
      line = (place * x.stride + head) * x.size
      line += lax.rem(first + at, jnp.int32(x.size))
    line = jnp.minimum(line, lines.shape[0] - step)
    found.append(lines[pl.ds(line, step), pl.ds(column, n)])
  value = found[0] if len(found) == 1 else jnp.concatenate(found)
  token = first + lax.broadcasted_iota(jnp.int32, (tile, n), 0)
  inside = (token >= begin) & (token < end)
  target[...] = jnp.where(inside, value, 0)


def _i32(value: int):
  return arith.constant(ir.IntegerType.get_signless(32), value)


def _add(a, b):
  return arith.addi(a, b)


def _mul(a, b: int):
  return arith.muli(a, _i32(b))
