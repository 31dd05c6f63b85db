"""Collectives in a compiled program: kinds, mesh axes and sizes.

XLA's text is parsed line by line: `%name = shape kind(operands), attributes`.
Instructions inside computations that a `while` runs count as in a loop.
"""

import dataclasses
import itertools
import math
import re

import numpy as np

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "collective-broadcast",
)

_INSTRUCTION = re.compile(
  rf"\s*(?:ROOT )?%\S+ = (.*?) ({'|'.join(KINDS)})(-start)?\("
)
_BYTES = {"pred": 1, "bf16": 2, "f16": 2}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction.

  Attributes:
    kind: One of `KINDS`.
    shapes: Shapes of its results; several arrays may share one instruction.
    nbytes: Bytes of its results on one device.
    axes: The mesh axes it runs over, or None if it is no product of them.
    loops: Number of enclosing loops.
    line: The instruction.
  """

  kind: str
  shapes: tuple[tuple[int, ...], ...]
  nbytes: int
  axes: frozenset[str] | None
  loops: int
  line: str

  @property
  def largest(self) -> int:
    """Elements of its largest result on one device."""
    return max(math.prod(shape) for shape in self.shapes)


def collectives(text: str, mesh) -> list[Collective]:
  """Returns the collectives of `compiled.as_text()`.

  Args:
    text: Text of the program.
    mesh: The `jax.sharding.Mesh` it was compiled for.
  """
  computations = _computations(text)
  depth = _depths(computations)
  out = []
  for name, lines in computations.items():
    for line in lines:
      found = _INSTRUCTION.match(line)
      if found:
        shapes, nbytes = _shapes(found[1])
        if found[3]:  # (operand, result, ...)
          raise NotImplementedError(line)
        axes = _axes(line, mesh)
        out.append(
          Collective(found[2], shapes, nbytes, axes, depth[name], line.strip())
        )
  return out


def _computations(text):
  out, current = {}, None
  for line in text.splitlines():
    header = re.match(r"(?:ENTRY )?%(\S+) \(.*\{\s*$", line)
    if header:
      current = out.setdefault(header[1], [])
    elif line.startswith("}"):
      current = None
    elif current is not None:
      current.append(line)
  return out


def _depths(computations):
  """Returns the number of loops around each computation."""
  called = {name: set() for name in computations}
  for name, lines in computations.items():
    for line in lines:
      loop = re.search(r" while\(", line) is not None
      for attribute in re.findall(
        r"(?:body|condition|calls|to_apply|\w+_computation)=%([\w.\-]+)"
        r"|(?:branch_computations|called_computations)=\{([^}]*)\}",
        line,
      ):
        for callee in attribute[0:1] + tuple(attribute[1].split(",")):
          callee = callee.strip().removeprefix("%")
          if callee in computations:
            called[callee].add((name, loop))

  def depth(name):
    return max((depth(c) + loop for c, loop in called[name]), default=0)

  return {name: depth(name) for name in computations}


def _shapes(text):
  found = re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", text)
  shapes = tuple(tuple(int(d) for d in s.split(",") if d) for _, s in found)
  sizes = [_itemsize(kind) for kind, _ in found]
  total = sum(math.prod(s) * n for s, n in zip(shapes, sizes, strict=True))
  return shapes, total


def _itemsize(kind):
  if kind in _BYTES:
    return _BYTES[kind]
  return max(1, int(re.search(r"\d+", kind)[0]) // 8)


def _axes(line, mesh):
  """Returns the mesh axes whose devices communicate."""
  groups = _groups(line)
  sizes = {a: n for a, n in mesh.shape.items() if n > 1}
  for count in range(len(sizes) + 1):
    for names in itertools.combinations(sizes, count):
      if groups == _together(sizes, names):
        return frozenset(names)
  return None


def _together(sizes, names, ids=None):
  """Returns the groups of devices that differ only along `names`."""
  ids = np.arange(math.prod(sizes.values())) if ids is None else ids
  ids = ids.reshape(*sizes.values())
  inside = [i for i, a in enumerate(sizes) if a in names]
  moved = np.moveaxis(ids, inside, range(-len(inside), 0))
  size = math.prod(sizes[a] for a in names)
  return {frozenset(g) for g in moved.reshape(-1, size).tolist()}


def _groups(line):
  """Returns the groups of devices, from any of XLA's notations."""
  named = re.search(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? \{([^}]*)\}",
    line,
  )
  if named:
    sizes = re.findall(r"'(\w+)'=(\d+)", named[1])
    sizes = {name: int(size) for name, size in sizes}
    ids = None
    if named[2]:
      dims, order = ([int(i) for i in named[n].split(",")] for n in (2, 3))
      ids = np.arange(math.prod(dims)).reshape(dims).transpose(order)
    return _together(sizes, re.findall(r"'(\w+)'", named[4]), ids)
  iota = re.search(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line
  )
  if iota:
    shape, dims, order = (
      [int(i) for i in part.split(",")] if part else None
      for part in iota.groups()
    )
    ids = np.arange(math.prod(dims)).reshape(dims)
    ids = ids if order is None else ids.transpose(order)
    return {frozenset(g) for g in ids.reshape(shape).tolist()}
  listed = re.search(
    r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", line
  )
  return {
    frozenset(int(i) for i in group.split(","))
    for group in re.findall(r"\{([\d,]+)\}", listed[1])
  }
