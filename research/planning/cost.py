"""Cost of a compiled program per device: FLOPs, memory traffic, collectives.

Loop bodies are multiplied by their trip counts. FLOPs are those of matrix
products (2 per multiply-add), as is usual for utilisation. Bytes are those read
from and written to main memory, by the shapes in the program. Collectives are
listed individually, with the participating devices.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from research.planning import traffic, trips
from research.planning.hlo import Computation, Instruction, Program

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)

_STATED = re.compile(
  r'"cost_estimate":\{"flops":"(\d+)"'  # TPUs
  r"|cost_estimate_json = .*?flops\\22: (\d+)"  # GPUs
)
"""FLOPs that a Pallas kernel states, as XLA writes them."""


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation.

  Attributes:
    kind: one of `COLLECTIVES`.
    shapes: shapes of a device's operands, e.g. `("bf16[32,2048]",)`, largest
      first.
    operand_bytes: total bytes of the operands.
    group: the devices of the first group, by number in the mesh; for a
      permutation, the first pair.
    size: number of devices in a group.
  """

  kind: str
  shapes: tuple[str, ...]
  operand_bytes: int
  group: tuple[int, ...]
  size: int

  @property
  def payload(self) -> int:
    """Bytes of the full array that is gathered, reduced or passed on."""
    whole = self.size if self.kind == "all-gather" else 1
    return whole * self.operand_bytes

  @property
  def sent(self) -> float:
    """Bytes that each device sends, for ring algorithms."""
    if self.kind == "collective-permute":
      return float(self.operand_bytes)
    share = self.payload * (self.size - 1) / max(self.size, 1)
    return 2 * share if self.kind == "all-reduce" else share


@dataclasses.dataclass(frozen=True)
class Cost:
  """The cost of a program on one device.

  Attributes:
    flops: FLOPs of matrix products.
    bytes: bytes read from and written to main memory.
    cycles: the compiler's own estimate, if the program contains one.
    collectives: number of executions of each collective.
    unknown: number of loops with a data-dependent length, which count once.
  """

  flops: float = 0.0
  bytes: float = 0.0
  cycles: float = 0.0
  collectives: Mapping[Collective, float] = dataclasses.field(
    default_factory=dict
  )
  unknown: int = 0

  def __add__(self, other: "Cost") -> "Cost":
    counts = collections.Counter(self.collectives)
    counts.update(other.collectives)
    return Cost(
      self.flops + other.flops,
      self.bytes + other.bytes,
      self.cycles + other.cycles,
      dict(counts),
      self.unknown + other.unknown,
    )

  def times(self, n: int) -> "Cost":
    """Returns the cost of `n` repetitions."""
    return Cost(
      n * self.flops,
      n * self.bytes,
      n * self.cycles,
      {k: n * v for k, v in self.collectives.items()},
      self.unknown,
    )


def program_cost(program: Program, devices: int) -> Cost:
  """Returns the cost of one execution of `program` on each of `devices`."""
  return _Walk(program, devices).computation(program.entry)


class _Walk:
  """Sums the costs of computations, with memoization."""

  def __init__(self, program: Program, devices: int):
    self._program, self._devices = program, devices
    self._known: dict[str, Cost] = {}

  def computation(self, name: str) -> Cost:
    if name not in self._known:
      where, total = self._program.computations[name], Cost()
      for i in where.instructions:
        total += self._instruction(where, i)
      self._known[name] = total
    return self._known[name]

  def _instruction(self, where: Computation, i: Instruction) -> Cost:
    if i.opcode == "while":
      each = self.computation(i.calls("body"))
      each += self.computation(i.calls("condition"))
      n = trips.trip_count(self._program, where, i)
      if n is None:
        return dataclasses.replace(each, unknown=each.unknown + 1)
      return each.times(n)
    if i.opcode == "conditional":
      return _most([self.computation(name) for name in _branches(i)])
    if i.opcode == "call":
      return self.computation(i.calls("to_apply"))
    if i.opcode == "async-start":
      return self.computation(i.calls("calls"))
    if i.opcode in ("async-update", "async-done"):
      return Cost()  # what it started has been counted
    here = Cost(
      flops=_flops(where, i),
      bytes=traffic.instruction_bytes(self._program, where, i),
      cycles=_cycles(i),
      collectives=self._collective(where, i),
    )
    if i.opcode == "fusion":
      inner = self.computation(i.calls("calls"))
      if "all-reduce-scatter" in i.calls("calls"):
        inner = _scattered(inner)
      # Intermediate results of a fusion do not pass through memory.
      here += dataclasses.replace(inner, bytes=0.0, cycles=0.0)
    return here

  def _collective(self, where, i) -> dict[Collective, float]:
    kind = i.opcode.removesuffix("-start")
    if kind not in COLLECTIVES or _continued(where, i):
      return {}
    buffers = [b for o in where.operands(i) for b in o.buffers]
    buffers.sort(key=lambda b: -b.nbytes)
    group = _group(i, self._devices)
    size = self._devices if kind == "collective-permute" else len(group)
    found = Collective(
      kind,
      tuple(f"{b.dtype}[{','.join(map(str, b.shape))}]" for b in buffers),
      sum(b.nbytes for b in buffers),
      group,
      size,
    )
    return {found: 1.0} if len(group) > 1 else {}


def _continued(where: Computation, i: Instruction) -> bool:
  """Whether `i` continues a collective that another fusion started.

  On TPUs, a collective is split over the fusions that it overlaps with, and
  each of them names it again.
  """
  if "chain_id" not in (i.attribute("frontend_attributes") or ""):
    return False
  return not any(
    "AsyncCollectiveStart" in other.attributes for other in where.instructions
  )


def _branches(i: Instruction) -> list[str]:
  listed = i.attribute("branch_computations")
  if listed is not None:
    return [name.strip(" %") for name in listed.strip("{}").split(",")]
  return [i.calls("true_computation"), i.calls("false_computation")]


def _most(costs: list[Cost]) -> Cost:
  """Returns an upper bound of each cost, whichever branch is taken."""
  kinds = {kind for c in costs for kind in c.collectives}
  return Cost(
    max(c.flops for c in costs),
    max(c.bytes for c in costs),
    max(c.cycles for c in costs),
    {kind: max(c.collectives.get(kind, 0.0) for c in costs) for kind in kinds},
    max(c.unknown for c in costs),
  )


def _scattered(cost: Cost) -> Cost:
  """Converts all-reduces to reduce-scatters, for TPUs' fused form of those."""
  return dataclasses.replace(
    cost,
    collectives={
      dataclasses.replace(c, kind="reduce-scatter")
      if c.kind == "all-reduce"
      else c: n
      for c, n in cost.collectives.items()
    },
  )


def _group(i: Instruction, devices: int) -> tuple[int, ...]:
  """Returns the devices of the first group, or the first pair."""
  name = "replica_groups"
  text = i.attribute("source_target_pairs") or i.attribute(name) or ""
  if text.startswith("mesh"):  # mesh['a'=2,'b'=8] {'b'}
    _, _, rest = i.attributes.partition(name + "=")
    return _of_mesh(text, rest[len(text) :])
  if "<=" in text:  # [groups,size]<=[dims]T(permutation)
    shape, _, rest = text.partition("<=")
    dims, _, order = rest.partition("T")
    ids = np.arange(math.prod(_integers(dims))).reshape(_integers(dims))
    if order:
      ids = ids.transpose(_integers(order))
    return tuple(ids.reshape(_integers(shape))[0].tolist())
  groups = [_integers(group) for group in text.split("}")]
  # The first pair of a permutation may be a device and itself.
  groups = [g for g in groups if len(set(g)) > 1] or groups
  return groups[0] or tuple(range(devices))


def _of_mesh(mesh: str, rest: str) -> tuple[int, ...]:
  """Returns the first group along the named axes of a mesh of devices.

  A part of an axis may be named: `'a':(2)4` has size 4, after a part of size 2.
  """
  sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh))
  dims, chosen = [], []
  _, _, named = rest.partition("{")
  named, _, _ = named.partition("}")
  parts = {
    name: (int(before), int(size))
    for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", named)
  }
  for name, size in sizes.items():
    before, own = parts.get(name, (1, int(size)))
    dims += [before, own, int(size) // before // own]
    chosen += [False, f"'{name}'" in named, False]
  ids = np.arange(math.prod(dims)).reshape(dims)
  return tuple(
    ids[tuple(slice(None) if c else 0 for c in chosen)].reshape(-1).tolist()
  )


def _integers(text: str) -> tuple[int, ...]:
  return tuple(map(int, re.findall(r"\d+", text)))


def _cycles(i: Instruction) -> float:
  _, _, rest = i.attributes.partition('"estimated_cycles":"')
  digits = rest.partition('"')[0]
  return float(digits) if digits.isdigit() else 0.0


def _flops(where: Computation, i: Instruction) -> float:
  if i.opcode in ("dot", "ragged-dot"):
    left = next(where.operands(i)).buffers[0].shape
    dims = i.numbers("lhs_contracting_dims")
    total = 2.0 * i.buffers[0].size * math.prod(left[d] for d in dims)
    if i.opcode == "ragged-dot" and set(i.numbers("lhs_ragged_dims")) & {*dims}:
      # A gradient of the groups' matrices: each row is in one of the groups.
      *_, sizes = where.operands(i)
      return total / sizes.buffers[0].shape[-1]
    return total
  if i.opcode == "convolution":
    left, right = (o.buffers[0].shape for o in where.operands(i))
    return _convolution(i, left, right)
  if i.opcode == "custom-call":
    # A Pallas kernel states its FLOPs; its traffic is that of its operands.
    stated = _STATED.search(i.attributes)
    return float(stated.group(1) or stated.group(2)) if stated else 0.0
  return 0.0


def _convolution(i: Instruction, left, right) -> float:
  """Returns the FLOPs as XLA counts them: without products with padding."""
  labels = i.attribute("dim_labels") or ""
  a, _, rest = labels.partition("_")
  b, _, c = rest.partition("->")
  out = i.buffers[0].shape
  window = dict(
    part.split("=")
    for part in (i.attribute("window") or "").strip("{}").split()
  )
  valid = 1
  for d in range(len(a) - 2):

    def of(field, default, d=d):
      found = window.get(field)
      return found.split("x")[d] if found else default

    valid *= _positions(
      size=left[a.index(str(d))],
      out=out[c.index(str(d))],
      window=int(of("size", "1")),
      stride=int(of("stride", "1")),
      pad=int(of("pad", "0_0").split("_")[0]),
      spread=int(of("lhs_dilate", "1")),
      spaced=int(of("rhs_dilate", "1")),
    )
  # With groups of features or of rows, these are a group's already.
  batch, features = out[c.index("b")], out[c.index("f")]
  inner = right[b.index("i")]
  return 2.0 * batch * features * inner * valid


def _positions(size, out, window, stride, pad, spread, spaced) -> int:
  """Counts (output, kernel tap) pairs that use an input, not padding."""
  count, last = 0, (size - 1) * spread
  outs = np.arange(out) * stride - pad
  for tap in range(window):
    at = outs + tap * spaced
    count += int(((at >= 0) & (at <= last) & (at % spread == 0)).sum())
  return count
