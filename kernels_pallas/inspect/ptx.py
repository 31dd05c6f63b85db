"""Parses ptxas' report on a GPU kernel, and the kernel's PTX.

Unlike a TPU, a GPU schedules instructions at run time, so there is no schedule
to parse. The limits can be read: registers, spills, shared memory, and the
instructions of one iteration of the loop with the matmuls.
"""

import collections
import dataclasses
import pathlib
import re

_LABEL = re.compile(r"^(\$L\w+):")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$L\w+);")
_OPCODE = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)")
_MATMUL = re.compile(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma")
_SHAPE = re.compile(r"(w?g?)mma\.(?:mma_async|sync)\S*\.m(\d+)n(\d+)k(\d+)")
_DESCRIBED = re.compile(r"tcgen05\.mma\S*kind::f16 .*(%r\d+), %p\d+;")
_NUMBER = re.compile(r"mov\.b32\s+(%r\d+), (\d+);")
_KINDS = {
  "tcgen05.mma": "tcgen05",
  "wgmma.mma_async": "wgmma",
  "mma.sync": "mma",
  "cp.async.bulk.tensor": "copy",
}
_INLINE = re.compile("|".join(map(re.escape, _KINDS)))
_WARPS = {"wg": 1, "": 4}
"""Instructions of a warpgroup per instruction in the PTX: a `mma` is issued by
each of its four warps."""

_DEPTH = 16
"""Terms that a 16-bit `tcgen05.mma` sums: its K dimension."""

MIX = {
  "tcgen05": r"tcgen05\.mma",
  "wgmma": r"wgmma\.mma_async",
  "mma": r"mma\.sync",
  "copy": r"cp\.async\.(bulk|c[ag])",
  "matrix": r"ldmatrix\.",
  "tensor": r"tcgen05\.(ld|st)\.",
  "exp2": r"ex2\.",
  "fma": r"fma\.",
  "multiply": r"mul\.(rn\.)?b?f",
  "add": r"(add|sub)\.(rn\.)?b?f",
  "max": r"max\.",
  "convert": r"cvt\.",
  "shuffle": r"shfl\.",
  "integer": r"(add|sub|mad|mul|shl|shr|and|or|xor|bfe|lop3)\S*\.[bsu]\d",
  "select": r"(setp|selp)\.",
  "barrier": r"(mbarrier|bar|barrier|fence|tcgen05)\.",
  "memory": r"(ld|st)\.",
}
"""Kinds of instructions by the start of their opcode; first match counts."""


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One compiled kernel.

  Attributes:
    name: Name of its entry function.
    registers: Registers per thread, at launch.
    spills: Bytes of register spills stored, per thread.
    shared: Bytes of shared memory per block, or None if not in the dump.
    warnings: Warnings of ptxas.
    total: Instructions of each kind in the whole kernel.
    loop: Instructions of one iteration of the smallest loop with matmuls.
    flops: FLOPs of the matmuls of that iteration, per warpgroup.
  """

  name: str
  registers: int
  spills: int
  shared: int | None
  warnings: tuple[str, ...]
  total: dict[str, int]
  loop: dict[str, int]
  flops: int


def read(folder: pathlib.Path) -> list[Kernel]:
  """Returns the kernels that Mosaic GPU dumped into a folder.

  Raises:
    ValueError: There are none, or one in an unknown format.
  """
  found = [_read(path) for path in sorted(folder.glob("*.ptxas"))]
  if not found:
    raise ValueError(f"{folder}: found no *.ptxas, expected Mosaic GPU's dumps")
  return found


def _read(path: pathlib.Path) -> Kernel:
  report = path.read_text()
  registers = re.search(r"Used (\d+) registers", report)
  spills = re.search(
    r"(\d+) bytes spill stores, \d+ bytes spill loads\n", report
  )
  if registers is None or spills is None:
    raise ValueError(f"{path}: no line of registers or spills, another format")
  lines = path.with_suffix(".ptx").read_text().splitlines()
  # The dumps of one kernel may have different numbers.
  name = re.sub(r"_\d+$", "", path.stem)
  shared = None
  for dump in path.parent.glob(f"{name}_*.resources.txt"):
    number = re.search(r"smem_scratch_bytes=(\d+)", dump.read_text())
    shared = int(number[1]) if number else shared
  loop = _steady(lines)
  return Kernel(
    name=name,
    registers=int(registers[1]),
    spills=max(int(n) for n in re.findall(r"(\d+) bytes spill stores", report)),
    shared=shared,
    warnings=tuple(re.findall(r"ptxas warning\s*: (.*)", report)),
    total=mix(lines),
    loop=mix(loop),
    flops=_flops(loop, lines),
  )


def mix(lines: list[str]) -> dict[str, int]:
  """Counts the instructions of each kind of `MIX`, and others."""
  found = collections.Counter()
  for line in lines:
    # Inline assembly: a brace or a predicate may precede the instruction.
    if inline := _INLINE.search(line):
      found[_KINDS[inline[0]]] += 1
      continue
    opcode = _OPCODE.match(line)
    if opcode is None or line.lstrip().startswith((".", "//", "$")):
      continue
    kinds = (k for k, start in MIX.items() if re.match(start, opcode[1]))
    found[next(kinds, "other")] += 1
  return dict(found)


def _steady(lines: list[str]) -> list[str]:
  """Returns the smallest loop with a matmul: that of unmasked tiles."""
  labels, loops = {}, []
  for n, line in enumerate(lines):
    if label := _LABEL.match(line.strip()):
      labels[label[1]] = n
    branch = _BRANCH.search(line)
    if branch and branch[1] in labels:
      loops.append((labels[branch[1]], n + 1))
  bodies = [lines[a:b] for a, b in loops]
  bodies = [b for b in bodies if any(map(_MATMUL.search, b))]
  return min(bodies, key=len, default=[])


def _flops(loop: list[str], lines: list[str]) -> int:
  """Returns the FLOPs of the matmuls in a loop."""
  numbers = dict(
    found.groups() for found in map(_NUMBER.search, lines) if found
  )
  total = 0
  for line in loop:
    if described := _DESCRIBED.search(line):
      # The instruction descriptor (PTX ISA 9.7.16.4): N / 8 in bits 17 to 22,
      # M / 16 in bits 24 to 28.
      word = int(numbers[described[1]])
      m, n = (word >> 24 & 31) * 16, (word >> 17 & 63) * 8
      total += 2 * m * n * _DEPTH
    if shape := _SHAPE.search(line):
      m, n, k = (int(x) for x in shape.groups()[1:])
      total += 2 * m * n * k * _WARPS[shape[1]]
  return total
