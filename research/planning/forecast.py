"""Forecasts memory and time of a compiled step on a given topology.

Memory is the compiler's own analysis. Times are bounds from the chip's data
sheet (a roofline): a step takes at least the maximum of arithmetic, memory and
link time if everything overlaps, and about their sum if nothing does. A TPU's
link time assumes one axis of the torus: collectives over several axes may be
faster, small blocking ones are slower. GPUs of several hosts exchange over
NVLink and the network at the same time (`link_seconds`).
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from research.planning import cost, hlo
from research.planning.chips import Chip, Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
  """Memory of one device, in bytes.

  Attributes:
    arguments: state, weights and batch.
    outputs: new state and metrics, without those aliased to arguments.
    temporaries: everything else, mostly activations.
    total: peak use.
    limit: memory of the device.
  """

  arguments: int
  outputs: int
  temporaries: int
  total: int
  limit: float

  @property
  def fits(self) -> bool:
    """Whether the device has enough memory."""
    return self.total <= self.limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
  """Collectives of one kind, axes and shapes.

  Attributes:
    kind: such as `all-gather`.
    axes: mesh axes of the collective.
    shapes: shapes of each device's operands.
    count: number of executions in a step.
    payload: bytes gathered, reduced or passed on per execution.
    sent: bytes that each device sends in a step.
    seconds: of all executions, by the chip's links; None if unknown.
  """

  kind: str
  axes: tuple[str, ...]
  shapes: tuple[str, ...]
  count: float
  payload: int
  sent: float
  seconds: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
  """The cost of a step on each device.

  Attributes:
    devices: number of devices.
    peak_flops: peak FLOP/s of a device; None if unknown.
    memory: see `Memory`.
    flops: FLOPs of matrix products.
    bytes: main-memory traffic in bytes.
    exchanges: collectives, the most expensive first.
    unknown_loops: number of loops with a data-dependent length, which count
      once.
    seconds: lower bounds of the time for `arithmetic`, `memory` and `links`;
      empty if the chip's speed is unknown.
  """

  devices: int
  peak_flops: float | None
  memory: Memory
  flops: float
  bytes: float
  exchanges: tuple[Exchange, ...]
  unknown_loops: int
  seconds: Mapping[str, float]

  @property
  def at_least(self) -> float | None:
    """Lower bound of the seconds of a step: everything overlaps."""
    return max(self.seconds.values()) if self.seconds else None

  @property
  def without_overlap(self) -> float | None:
    """Seconds of a step if nothing overlaps."""
    return sum(self.seconds.values()) if self.seconds else None


def forecast(compiled: Any, mesh: Mesh, topology: Topology) -> Forecast:
  """Returns the forecast of a compiled step.

  Args:
    compiled: the step, compiled for the devices of `topology`.
    mesh: the mesh over those devices.
    topology: the devices and their chip.
  """
  found = cost.program_cost(hlo.parse(compiled.as_text()), mesh.size)
  exchanges = _exchanges(found, mesh, topology.chip)
  return Forecast(
    devices=mesh.size,
    peak_flops=topology.chip.flops,
    memory=_memory(compiled.memory_analysis(), topology.chip),
    flops=found.flops,
    bytes=found.bytes,
    exchanges=exchanges,
    unknown_loops=found.unknown,
    seconds=_seconds(topology.chip, found, exchanges),
  )


def _memory(usage: Any, chip: Chip) -> Memory:
  kept = usage.alias_size_in_bytes
  outputs = max(0, usage.output_size_in_bytes - kept)
  arguments = usage.argument_size_in_bytes
  return Memory(
    arguments=arguments,
    outputs=outputs,
    temporaries=peak_bytes(usage) - arguments - outputs,
    total=peak_bytes(usage) + usage.generated_code_size_in_bytes,
    limit=chip.memory,
  )


def peak_bytes(usage: Any) -> int:
  """Returns the peak main memory of a program's arrays, in bytes.

  For a TPU, `temp_size_in_bytes` overestimates programs with loops (by 0.7e9 of
  2.1e9 for a step of QLoRA): not all of it is main memory. The compiler decides
  whether a program fits by the number that is returned here.

  Args:
    usage: from `jax.stages.Compiled.memory_analysis`.
  """
  kept = usage.alias_size_in_bytes
  arguments = usage.argument_size_in_bytes
  given = arguments + max(0, usage.output_size_in_bytes - kept)
  # Older versions of jaxlib, and other plugins, do not provide it.
  found = getattr(usage, "total_allocation_bytes", 0)
  return found or given + usage.temp_size_in_bytes


def _seconds(
  chip: Chip, found: cost.Cost, exchanges: tuple[Exchange, ...]
) -> dict[str, float]:
  if not (chip.flops and chip.bandwidth and chip.link):
    return {}
  return {
    "arithmetic": found.flops / chip.flops,
    "memory": found.bytes / chip.bandwidth,
    "links": sum((e.seconds or 0.0 for e in exchanges), 0.0),
  }


def link_seconds(
  chip: Chip, collective: cost.Collective, hosts: int
) -> float | None:
  """Returns the least seconds of a collective, once; None if unknown.

  Within a host, or a TPU slice, a ring sends `collective.sent` over a link.
  Between hosts each host gets what it has not, through the network ports of all
  its devices in the group; both happen at the same time.

  Args:
    chip: of each device.
    collective: with a group.
    hosts: over how many hosts the group is spread evenly.
  """
  if chip.link is None:
    return None
  within = collective.sent / chip.link
  if hosts < 2 or chip.network is None:
    return within
  ports = max(1, collective.size // hosts)
  if collective.kind == "collective-permute":
    between = float(collective.operand_bytes)
  elif collective.kind in ("all-to-all", "ragged-all-to-all"):
    # What each device sends, unless the receiver is a neighbour.
    between = collective.operand_bytes * (hosts - 1) / hosts
  else:
    rounds = 2 if collective.kind == "all-reduce" else 1
    between = rounds * collective.payload * (hosts - 1) / hosts / ports
  return max(within, between / chip.network)


def hosts_along(axes: tuple[str, ...], mesh: Any) -> int:
  """Returns over how many hosts a group along some axes of a mesh is spread."""
  index = tuple(slice(None) if n in axes else 0 for n in mesh.axis_names)
  return len({d.process_index for d in np.ravel(mesh.devices[index])})


def _exchanges(
  found: cost.Cost, mesh: Mesh, chip: Chip
) -> tuple[Exchange, ...]:
  def key(one):
    shapes = tuple(re.sub(r"(?<=\[)(1,)+", "", s) for s in one.shapes)
    return one.kind, _axes(one.group, mesh), shapes

  ordered = sorted(found.collectives.items(), key=lambda item: key(item[0]))
  out = []
  for (kind, axes, shapes), same in itertools.groupby(
    ordered, key=lambda item: key(item[0])
  ):
    each = list(same)
    out.append(
      Exchange(
        kind=kind,
        axes=axes,
        shapes=shapes,
        count=sum(n for _, n in each),
        payload=each[0][0].payload,
        sent=sum(n * one.sent for one, n in each),
        seconds=_total_seconds(each, hosts_along(axes, mesh), chip),
      )
    )
  return tuple(sorted(out, key=lambda e: -e.sent))


def _total_seconds(each, hosts: int, chip: Chip) -> float | None:
  if chip.link is None:
    return None
  return sum(n * (link_seconds(chip, one, hosts) or 0.0) for one, n in each)


def _axes(group: tuple[int, ...], mesh: Mesh) -> tuple[str, ...]:
  """Returns the mesh axes along which a group's devices differ."""
  places = np.stack(np.unravel_index(group, mesh.devices.shape))
  differ = (places != places[:, :1]).any(axis=1)
  return tuple(n for n, d in zip(mesh.axis_names, differ, strict=True) if d)
