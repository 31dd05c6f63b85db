"""Instructions of the copies in `gpu_copy`: addresses and `cp.async`."""

import dataclasses

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref

CHUNK = 16
"""Bytes that a thread copies at a time."""

THREADS = 128
LINES = 8
"""Rows per swizzled tile."""


@dataclasses.dataclass(frozen=True)
class Source:
  """How the tokens of a batch row map to lines of an array `[lines, columns]`.

  With a page table, token t is in line
  `(page * stride + head) * size + t % size`, where page is entry
  `row * width + t // size` of the table. Without one it is in line
  `row * size + t`, and the head selects columns.

  Attributes:
    size: Tokens per page, or per row of the cache.
    width: Pages per row of the table, or None without a table.
    stride: Number of key heads.
  """

  size: int
  width: int | None
  stride: int


class _Rows:
  """The line of each token of a tile, and whether it is read."""

  def __init__(self, x: Source, table, tile, where):
    self.x, self.table = x, table
    self.row, self.head, self.first, self.begin, self.end = where
    last = arith.subi(self.end, i32(1))
    self.last, self.once = arith.maxsi(last, i32(0)), None
    if x.width is not None and x.size % tile == 0:
      # A tile starts at a multiple of its size, so it lies within one page.
      self.once = self._page(arith.minsi(self.first, self.last))

  def token(self, r):
    """Returns row r's token, clamped to a readable one, and its validity."""
    token = _add(self.first, r)
    inside = arith.andi(
      arith.cmpi(arith.CmpIPredicate.sge, token, self.begin),
      arith.cmpi(arith.CmpIPredicate.slt, token, self.end),
    )
    return arith.select(inside, token, self.last), inside

  def line(self, token, many=1, which=None):
    """Returns a token's line in an array of `many` sets of heads a page."""
    if self.x.width is None:
      return _add(_mul(self.row, self.x.size), token)
    place = self._page(token) if self.once is None else self.once
    place = _mul(place, many * self.x.stride)
    if which is not None:
      place = _add(place, _mul(which, self.x.stride))
    at = arith.remui(token, i32(self.x.size))
    return _add(_mul(_add(place, self.head), self.x.size), at)

  def _page(self, token):
    place = arith.divui(token, i32(self.x.size))
    place = _add(_mul(self.row, self.x.width), place)
    place = arith.index_cast(ir.IndexType.get(), place)
    return memref.load(self.table, [place])


def _thread():
  return arith.remui(mgpu.utils.thread_idx(), i32(THREADS))


def copy_rows(x: Source, table, copies, where):
  """Emits one thread's copies of rows: rows outermost, then chunks."""
  shapes = [ir.MemRefType(into.type).shape[-4:] for _, _, into in copies]
  tile = shapes[0][0] * LINES
  across = [n[1] * n[3] * 2 // CHUNK for n in shapes]
  rows, thread = _Rows(x, table, tile, where), _thread()
  starts = [
    _start(*one, thread, n) for one, n in zip(copies, across, strict=True)
  ]
  for n in range(tile * max(across) // THREADS):
    line = None
    for one, wide in zip(starts, across, strict=True):
      if n >= tile * wide // THREADS:
        continue
      if line is None or wide != across[0]:
        r = arith.divui(_add(thread, i32(n * THREADS)), i32(wide))
        token, inside = rows.token(r)
        line = rows.line(token)
        read = arith.select(inside, i32(CHUNK), i32(0))
      _issue(one, line, r, read)


def copy_scales(x: Source, table, scales, into, where):
  """Emits one thread's copy of a scale."""
  tile = ir.MemRefType(into.type).shape[0] // 2
  rows, thread = _Rows(x, table, tile, where), _thread()
  # For short tiles several threads copy the same scale.
  at = arith.remui(thread, i32(2 * tile))
  token, inside = rows.token(arith.remui(at, i32(tile)))
  line = rows.line(token, 2, arith.divui(at, i32(tile)))
  word, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
  source = llvm.ptrtoint(i64, _global(scales))
  offset = arith.muli(arith.extui(i64, line), arith.constant(i64, 4))
  source = arith.addi(source, offset)
  target = llvm.ptrtoint(word, mgpu.utils.memref_ptr(into))
  read = arith.select(inside, i32(4), i32(0))
  _cp_async("ca", 4, _add(target, _mul(at, 4)), source, read)


def copy_rectangle(source, into, where):
  """Emits one thread's copies of a rectangle of a matrix.

  Args:
    source: [lines, columns].
    into: [height, width] in shared memory, contiguous, not swizzled.
    where: (first line, first column, bytes to read per chunk).
  """
  line, column, read = where
  i64 = ir.IntegerType.get_signless(64)
  kind = ir.MemRefType(source.type)
  size = mgpu.utils.bitwidth(kind.element_type) // 8
  height, width = ir.MemRefType(into.type).shape
  across = width * size // CHUNK
  total, pitch = height * across, arith.constant(i64, kind.shape[1] * size)
  base = llvm.ptrtoint(i64, _global(source))
  target = llvm.ptrtoint(
    ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(into)
  )
  for n in range(-(-total // THREADS)):
    at = _add(_thread(), i32(n * THREADS))
    if total % THREADS:
      # For small rectangles several threads copy the same chunk.
      at = arith.remui(at, i32(total))
    y = _add(line, arith.divui(at, i32(across)))
    x = _add(_mul(column, size), _mul(arith.remui(at, i32(across)), CHUNK))
    offset = arith.muli(arith.extui(i64, y), pitch)
    offset = arith.addi(offset, arith.extui(i64, x))
    place = _add(target, _mul(at, CHUNK))
    _cp_async("cg", CHUNK, place, arith.addi(base, offset), read)


def _global(lines):
  space = llvm.PointerType.get(address_space=1)
  return llvm.addrspacecast(space, mgpu.utils.memref_ptr(lines))


def _start(lines, column, into, thread, across):
  """Returns a thread's addresses, line pitch, chunk and the tile's shape."""
  word, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
  kind = ir.MemRefType(lines.type)
  size = mgpu.utils.bitwidth(kind.element_type) // 8
  # THREADS is a multiple of a row's chunks, so a thread stays in one column.
  chunk = arith.remui(thread, i32(across))
  offset = _add(_mul(column.registers.item(), size), _mul(chunk, CHUNK))
  source = llvm.ptrtoint(i64, _global(lines))
  source = arith.addi(source, arith.extui(i64, offset))
  target = llvm.ptrtoint(word, mgpu.utils.memref_ptr(into))
  _, wide, _, columns = ir.MemRefType(into.type).shape[-4:]
  return source, target, kind.shape[1] * size, chunk, wide, 2 * columns


def _issue(one, line, r, read):
  """Emits one instruction: 16 bytes of a line to row r of a tile."""
  source, target, width, chunk, wide, swizzle = one
  i64, chunks = ir.IntegerType.get_signless(64), swizzle // CHUNK
  offset = arith.muli(arith.extui(i64, line), arith.constant(i64, width))
  inner, outer = arith.remui(r, i32(LINES)), arith.divui(r, i32(LINES))
  block = _add(_mul(outer, wide), arith.divui(chunk, i32(chunks)))
  # The swizzle XORs address bits from 7 on into bits from 4 on.
  turn = arith.divui(inner, i32(LINES // chunks))
  place = arith.xori(arith.remui(chunk, i32(chunks)), turn)
  at = _add(_mul(block, LINES), inner)
  at = _add(_mul(at, swizzle), _mul(place, CHUNK))
  _cp_async("cg", CHUNK, _add(target, at), arith.addi(source, offset), read)


def _cp_async(kind, size, target, source, read):
  llvm.inline_asm(
    ir.Type.parse("!llvm.void"),
    [target, source, read],
    f"cp.async.{kind}.shared.global [$0], [$1], {size}, $2;",
    "r,l,r,~{memory}",
    has_side_effects=True,
  )


def i32(value: int):
  """Returns a 32-bit integer constant."""
  return arith.constant(ir.IntegerType.get_signless(32), value)


def _add(a, b):
  return arith.addi(a, b)


def _mul(a, b: int):
  return arith.muli(a, i32(b))
