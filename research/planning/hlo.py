"""Parser for the HLO text of compiled programs.

XLA's cost analysis counts loop bodies once, but a model is a loop over its
layers. The HLO text contains everything needed for a correct count: operands,
shapes, device groups of collectives, and trip counts. It has one instruction
per line:

  [ROOT] %name = SHAPE opcode(%operand, ...), attribute=..., ...
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from functools import cached_property

from research.typing import UserError

BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
"""Bits of element types whose name does not end with their width."""

_COMPUTATION = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT\s+)?%?([\w.\-]+)\s*=\s*(.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_BUFFER = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Buffer:
  """An array in the program.

  Attributes:
    dtype: XLA's name: f32, bf16, s4, ...
    shape: its dimensions.
    space: memory space; 0 is the device's main memory.
  """

  dtype: str
  shape: tuple[int, ...]
  space: int = 0

  @property
  def size(self) -> int:
    """Number of elements."""
    size = 1
    for dim in self.shape:
      size *= dim
    return size

  @property
  def nbytes(self) -> int:
    """Bytes, without tiling padding."""
    bits = BITS.get(self.dtype)
    if bits is None:
      found = re.match(r"[a-z]+(\d+)", self.dtype)
      bits = int(found.group(1)) if found else 0
    return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """An instruction: one line of a computation.

  Attributes:
    name: name, unique in its computation.
    opcode: such as `dot`, `while`, `all-gather-start`.
    buffers: the arrays of its result; for a tuple, its leaves in order.
    operands: names of instructions of the same computation.
    argument: the text in the parentheses.
    attributes: the rest of the line.
  """

  name: str
  opcode: str
  buffers: tuple[Buffer, ...]
  operands: tuple[str, ...]
  argument: str
  attributes: str

  def attribute(self, name: str) -> str | None:
    """Returns the value of attribute `name` as text, or None."""
    found = re.search(rf"(?:^|[\s,]){name}=", self.attributes)
    if not found:
      return None
    return _balanced(self.attributes[found.end() :])

  def calls(self, name: str) -> str:
    """Returns the name of the computation that attribute `name` refers to."""
    return (self.attribute(name) or "").lstrip("%")

  def numbers(self, name: str) -> tuple[int, ...]:
    """Returns the integers in attribute `name`."""
    return tuple(map(int, re.findall(r"-?\d+", self.attribute(name) or "")))


@dataclasses.dataclass(frozen=True)
class Computation:
  """A computation (function) of the program, in execution order."""

  name: str
  instructions: tuple[Instruction, ...]
  root: str

  @cached_property
  def by_name(self) -> Mapping[str, Instruction]:
    """The instructions by name."""
    return {i.name: i for i in self.instructions}

  @cached_property
  def parameters(self) -> Mapping[int, Instruction]:
    """The parameters by number."""
    return {
      int(i.argument): i for i in self.instructions if i.opcode == "parameter"
    }

  def operands(self, instruction: Instruction) -> Iterator[Instruction]:
    """Yields the instructions whose results `instruction` takes."""
    for name in instruction.operands:
      if name in self.by_name:
        yield self.by_name[name]


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled HLO module."""

  computations: Mapping[str, Computation]
  entry: str


def parse(text: str) -> Program:
  """Parses the text of `compiled.as_text()`.

  Raises:
    UserError: it is not an HLO module.
  """
  found, entry, name, lines, root = {}, None, None, [], ""
  for line in text.splitlines():
    if name is None:
      header = _COMPUTATION.match(line)
      if header:
        name, lines, root = header.group(2), [], ""
        entry = name if header.group(1) else entry
    elif line.startswith("}"):
      found[name] = Computation(name, tuple(lines), root)
      name = None
    else:
      match = _INSTRUCTION.match(line)
      if match:
        lines.append(_instruction(match.group(2), match.group(3)))
        root = match.group(2) if match.group(1) else root
  if entry is None:
    raise UserError(
      "HLO text: found no ENTRY computation, expected compiled.as_text()"
    )
  return Program(found, entry)


def _instruction(name: str, text: str) -> Instruction:
  text = re.sub(r"/\*.*?\*/", "", text)
  shape = _balanced(text)
  opcode = _OPCODE.match(text, len(shape))
  if opcode is None:
    raise UserError(f"HLO text: cannot parse {name} = {text[:60]}")
  argument = _inside(text[opcode.end() - 1 :])
  return Instruction(
    name,
    opcode.group(1),
    tuple(_buffers(shape)),
    tuple(re.findall(r"%([\w.\-]+)", argument)),
    argument,
    text[opcode.end() + len(argument) + 1 :],
  )


def _buffers(shape: str) -> Iterator[Buffer]:
  for dtype, dims, layout in _BUFFER.findall(shape):
    space = _SPACE.search(layout)
    yield Buffer(
      dtype,
      tuple(int(d.lstrip("<=")) for d in dims.split(",") if d),
      int(space.group(1)) if space else 0,
    )


def _balanced(text: str) -> str:
  """Returns `text` up to the first space or comma outside brackets."""
  depth = 0
  for i, c in enumerate(text):
    if c in "([{":
      depth += 1
    elif c in ")]}":
      depth -= 1
    elif not depth and c in " ,":
      return text[:i]
    if depth < 0:
      return text[:i]
  return text


def _inside(text: str) -> str:
  """Returns the text between the first parenthesis and its match."""
  depth = 0
  for i, c in enumerate(text):
    depth += (c in "([{") - (c in ")]}")
    if not depth:
      return text[1:i]
  return text[1:]
