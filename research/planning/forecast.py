"""What a compiled step will need and take on devices that are not here.

Memory is the compiler's own account. Seconds are bounds from the chip's data
sheet: a step takes at least as long as the slowest of arithmetic, memory and
links, if everything overlaps, and about their sum if nothing does. Links are
those of one axis of the torus: collectives over several axes may be faster,
those that are waited for in small pieces are slower.
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
  """Bytes of one device.

  Attributes:
    arguments: state, weights and batch.
    outputs: new state and metrics, besides what takes the place of arguments.
    temporaries: everything in between, activations above all.
    total: at the peak.
    limit: what the device has.
  """

  arguments: int
  outputs: int
  temporaries: int
  total: int
  limit: float

  @property
  def fits(self) -> bool:
    """Whether the device has that much."""
    return self.total <= self.limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
  """Collectives of one kind.

  Attributes:
    kind: such as `all-gather`.
    axes: of the mesh, that they go over.
    shapes: of what each device puts in.
    count: in a step.
    payload: bytes that are gathered, reduced or passed on, each time.
    sent: bytes that each device sends in a step.
  """

  kind: str
  axes: tuple[str, ...]
  shapes: tuple[str, ...]
  count: float
  payload: int
  sent: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
  """A step's cost on each device.

  Attributes:
    devices: how many there are.
    peak_flops: of each, a second; None where the chip's speed is not known.
    memory: see `Memory`.
    flops: of matrix products, on one device.
    bytes: through main memory.
    exchanges: the most expensive first.
    unknown_loops: loops whose length depends on data; they count once.
    seconds: by what would take them: `arithmetic`, `memory`, `links`; empty
      where the chip's speed is not known.
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
    """Seconds of a step if everything overlaps."""
    return max(self.seconds.values()) if self.seconds else None

  @property
  def without_overlap(self) -> float | None:
    """Seconds of a step if nothing overlaps."""
    return sum(self.seconds.values()) if self.seconds else None


def forecast(compiled: Any, mesh: Mesh, topology: Topology) -> Forecast:
  """Returns what a step costs.

  Args:
    compiled: the step, for the devices of `topology`.
    mesh: over those devices.
    topology: what it was compiled for.
  """
  found = cost.program_cost(hlo.parse(compiled.as_text()), mesh.size)
  exchanges = _exchanges(found, mesh)
  sent = sum((e.sent for e in exchanges), 0.0)
  return Forecast(
    devices=mesh.size,
    peak_flops=topology.chip.flops,
    memory=_memory(compiled.memory_analysis(), topology.chip),
    flops=found.flops,
    bytes=found.bytes,
    exchanges=exchanges,
    unknown_loops=found.unknown,
    seconds=_seconds(topology.chip, found, sent),
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
  """Returns the bytes of main memory that a program's arrays take.

  Args:
    usage: of `jax.stages.Compiled.memory_analysis`.

  For a TPU `temp_size_in_bytes` is more than that where a program loops (by
  0.7e9 of 2.1e9 for a step of QLoRA): not all of it is main memory. The
  compiler refuses a program by the figure that is returned here.
  """
  kept = usage.alias_size_in_bytes
  arguments = usage.argument_size_in_bytes
  given = arguments + max(0, usage.output_size_in_bytes - kept)
  # Older versions of jaxlib, and other plugins, do not say.
  found = getattr(usage, "total_allocation_bytes", 0)
  return found or given + usage.temp_size_in_bytes


def _seconds(chip: Chip, found: cost.Cost, sent: float) -> dict[str, float]:
  if not (chip.flops and chip.bandwidth and chip.link):
    return {}
  return {
    "arithmetic": found.flops / chip.flops,
    "memory": found.bytes / chip.bandwidth,
    "links": sent / chip.link,
  }


def _exchanges(found: cost.Cost, mesh: Mesh) -> tuple[Exchange, ...]:
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
      )
    )
  return tuple(sorted(out, key=lambda e: -e.sent))


def _axes(group: tuple[int, ...], mesh: Mesh) -> tuple[str, ...]:
  """Returns the axes of the mesh along which a group's devices differ."""
  places = np.stack(np.unravel_index(group, mesh.devices.shape))
  differ = (places != places[:, :1]).any(axis=1)
  return tuple(n for n, d in zip(mesh.axis_names, differ, strict=True) if d)
