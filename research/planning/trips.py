"""Trip counts of the loops in a compiled program.

On CPUs, XLA annotates loops with their trip count. Elsewhere it is derived: the
condition compares an element of the carry with a constant, and the body adds a
constant to that element.
"""

import dataclasses
import re

from research.planning.hlo import Computation, Instruction, Program

_ALIASES = ("copy", "bitcast", "convert", "reshape", "bitcast-convert")
_NOTED = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class _Carry:
  """An element of a loop's carry, before the iteration."""

  index: int


def trip_count(
  program: Program, where: Computation, loop: Instruction
) -> int | None:
  """Returns the trip count of `loop` in `where`; None if data-dependent."""
  noted = _NOTED.search(loop.attributes)
  if noted:
    return int(noted.group(1))
  condition = program.computations[loop.calls("condition")]
  compared = _operation(program, condition, condition.root, "compare")
  if compared is None:
    return None
  direction, (left, right) = compared
  if direction in ("GT", "GE"):
    direction, left, right = direction.replace("G", "L"), right, left
  if not isinstance(left, _Carry) or direction not in ("LT", "LE"):
    return None
  first = _initial(where, loop, left.index)
  bound = right
  if isinstance(right, _Carry):
    bound = _initial(where, loop, right.index)
  if first is None or not isinstance(bound, int):
    return None
  step = _step(program, loop, left.index)
  return max(0, -(-(bound + (direction == "LE") - first) // step))


def _initial(where: Computation, loop: Instruction, index: int) -> int | None:
  """Returns the constant initial value of carry element `index`, or None."""
  start = next(where.operands(loop), None)
  while start is not None and start.opcode in (*_ALIASES, "opt-barrier"):
    start = next(where.operands(start), None)
  if start is None or start.opcode != "tuple":
    return None
  found = _origin(where, start.operands[index])
  return found if isinstance(found, int) else None


def _step(program: Program, loop: Instruction, index: int) -> int:
  """Returns the constant that the body adds to carry element `index`, or 1."""
  body = program.computations[loop.calls("body")]
  root = body.by_name[body.root]
  if root.opcode != "tuple":
    return 1
  added = _operation(program, body, root.operands[index], "add")
  if added is None:
    return 1
  steps = [x for x in added[1] if isinstance(x, int) and x > 0]
  return steps[0] if len(steps) == 1 else 1


def _operation(program, where, name, opcode, arguments=()):
  """Returns (direction, origins of the operands) of an operation, or None.

  If it is the root of a fusion, `arguments` are the fusion's operands.
  """
  i = where.by_name.get(name)
  while i is not None and i.opcode in _ALIASES:
    i = next(where.operands(i), None)
  if i is None:
    return None
  origins = [_origin(where, o, arguments) for o in i.operands]
  if i.opcode == "fusion":
    inner = program.computations[i.calls("calls")]
    return _operation(program, inner, inner.root, opcode, origins)
  if i.opcode != opcode or len(origins) != 2:
    return None
  return i.attribute("direction"), origins


def _origin(where: Computation, name: str, arguments=()) -> int | _Carry | None:
  """Returns the constant or carry element that a value equals, or None."""
  i = where.by_name.get(name)
  while i is not None and i.opcode in _ALIASES:
    i = next(where.operands(i), None)
  if i is None:
    return None
  if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.argument):
    return int(i.argument)
  if i.opcode == "parameter" and int(i.argument) < len(arguments):
    return arguments[int(i.argument)]
  if i.opcode == "get-tuple-element":
    source = next(where.operands(i), None)
    if source is not None and source.opcode == "parameter":
      return _Carry(i.numbers("index")[0])
  return None
