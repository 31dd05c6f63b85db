"""Main-memory traffic of HLO instructions, in bytes.

Counts the bytes that an instruction reads and writes, by the shapes of its
operands and result. Accounts for in-place operations: a slice reads only the
slice, an update writes only the updated part, and likewise for fusions that
begin or end with one. A scanned model slices one layer from a stack in each
iteration; counting the whole stack would overestimate by the number of layers.
"""

from collections.abc import Iterable

from research.planning.hlo import Buffer, Computation, Instruction, Program

_FREE = (
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "after-all",
  "partition-id",
  "replica-id",
  "opt-barrier",
  "iota",
  "domain",
)
_ALIASES = ("bitcast", "reshape", "copy", "convert", "transpose")
_SLICES = ("dynamic-slice", "slice", "gather")


def instruction_bytes(
  program: Program, where: Computation, i: Instruction
) -> float:
  """Returns the bytes moved by one execution of `i`, outside of a fusion."""
  if i.opcode in _FREE:
    return 0.0
  operands = list(where.operands(i))
  if i.opcode.endswith("-done"):
    return _main(i.buffers)
  if i.opcode == "fusion":
    return _fusion(program, i, operands)
  if i.opcode in _SLICES or i.opcode.startswith(("slice-", "dynamic-slice-")):
    # The second buffer of an asynchronous slice's start is the slice.
    read = i.buffers[1:2] if i.opcode.endswith("-start") else i.buffers
    source = _main(operands[0].buffers) if operands else 0.0
    return (_whole(read) if source else 0.0) + (
      0.0 if i.opcode.endswith("-start") else _main(i.buffers)
    )
  if i.opcode == "dynamic-update-slice":
    update = operands[1].buffers
    return _main(update) + (_whole(update) if _main(i.buffers) else 0.0)
  read = sum((_main(o.buffers) for o in operands), 0.0)
  return read if i.opcode.endswith("-start") else read + _main(i.buffers)


def _fusion(program: Program, i: Instruction, operands) -> float:
  inner = program.computations[i.calls("calls")]
  total = 0.0
  for number, operand in enumerate(operands):
    parameter = inner.parameters.get(number)
    if parameter is not None and _main(operand.buffers):
      whole = _whole(operand.buffers)
      total += min(whole, _read(program, inner, parameter.name))
  for part, buffer in zip(_outputs(inner), i.buffers, strict=False):
    if buffer.space == 0:
      total += _written(inner, part, buffer)
  return total


def _read(program: Program, where: Computation, name: str) -> float:
  """Returns the bytes of value `name` that a fused computation reads."""
  total = 0.0
  for i in where.instructions:
    if name not in i.operands:
      continue
    if i.opcode in _SLICES:
      total += _whole(i.buffers)
    elif i.opcode == "dynamic-update-slice" and i.operands[0] == name:
      continue  # in place: the rest is not accessed
    elif i.opcode in ("bitcast", "reshape"):
      total += _read(program, where, i.name)
    elif i.opcode == "fusion":
      inner = program.computations[i.calls("calls")]
      for number, operand in enumerate(i.operands):
        if operand == name and number in inner.parameters:
          total += _read(program, inner, inner.parameters[number].name)
    else:
      return _whole(where.by_name[name].buffers)
  return total


def _outputs(where: Computation) -> list[Instruction]:
  root = where.by_name[where.root]
  return list(where.operands(root)) if root.opcode == "tuple" else [root]


def _written(where: Computation, i: Instruction, buffer: Buffer) -> float:
  """Returns the bytes that an output of a fusion writes."""
  while i.opcode in _ALIASES and i.operands:
    source = next(where.operands(i), None)
    if source is None or source.buffers[0].size != buffer.size:
      break
    i = source
  if i.opcode == "dynamic-update-slice":
    return _whole(where.by_name[i.operands[1]].buffers)
  return float(buffer.nbytes)


def _main(buffers: Iterable[Buffer]) -> float:
  """Returns the total bytes of the buffers in main memory."""
  return float(sum(b.nbytes for b in buffers if b.space == 0))


def _whole(buffers: Iterable[Buffer]) -> float:
  return float(sum(b.nbytes for b in buffers))
