"""Parses libtpu's final schedule of a kernel: bundles, slots, matrix work.

Two dumps are needed: `*final_bundles.txt` lists every bundle with its
instructions and loop depth, and `*final_hlo-static-per-bundle-utilization` how
many slots of each kind it fills. Neither format is documented; anything
unexpected is an error, never a number.
"""

import dataclasses
import pathlib
import re

import numpy as np

from kernels_pallas.inspect.chips import Chip

FULL_DEPTH = 128
"""Least depth of contractions, which are padded to the lanes of a register."""

_BUNDLE = re.compile(
  r"^ *(?:0x[0-9a-f]+|0) *(?:[A-Z]{2})? *: *((?:> *)*)\{", re.M
)
_VMEM = re.compile(r"^ *#allocation.*space=vmem, size = (0x[0-9a-f]+)", re.M)
_MATRIX = re.compile(r"\b(vmatmul|vmatpush[0-9]?)((?:\.\w+(?:\[\d+\])?)*)")


@dataclasses.dataclass(frozen=True)
class Schedule:
  """One kernel's schedule, per grid step.

  Attributes:
    name: Name of the kernel.
    slots: Names of the slots.
    capacity: int [slots], number of each slot per bundle.
    use: int [bundles, slots], slots used by each bundle of a grid step, in
    order.
    weight: float [bundles], how often each runs in a grid step.
    macs: bf16 multiply-adds per grid step on the matrix units.
    vmem: Bytes of VMEM of the kernel, or None if not in the dumps.
  """

  name: str
  slots: tuple[str, ...]
  capacity: np.ndarray
  use: np.ndarray
  weight: np.ndarray
  macs: float
  vmem: int | None = None

  @property
  def bundles(self) -> float:
    """Bundles per grid step, loop bodies as often as they run."""
    return float(self.weight.sum())

  def share(self) -> dict[str, float]:
    """Returns the utilization of each slot, at most 1."""
    used = (self.use * self.weight[:, None]).sum(0)
    return dict(
      zip(self.slots, used / self.capacity / self.bundles, strict=True)
    )

  def spills(self) -> int:
    """Returns the vector register spills per grid step."""
    used = (self.use * self.weight[:, None]).sum(0)
    return int(used[self.slots.index("VSTORE:SPILL")])


def read(
  folder: pathlib.Path, name: str, chip: Chip, trips: tuple[int, ...] = ()
) -> Schedule:
  """Parses the schedule of kernel `name` from the dumps in `folder`.

  Args:
    folder: Folder of libtpu's dumps.
    name: Substring of the kernel's name.
    chip: The chip that it was compiled for.
    trips: How often each loop inside a grid step runs, in program order.

  Raises:
    ValueError: There is no such kernel, or `trips` does not match its loops.
  """
  bundles = _one(folder, name, "*[0-9]-final_bundles.txt").read_text()
  table = _one(folder, name, "*-final_hlo-static-per-bundle-utilization.txt")
  slots, capacity, use = _table(table.read_text())
  starts = list(_BUNDLE.finditer(bundles))
  if len(starts) != len(use):
    raise ValueError(
      f"schedule of {name}: found {len(starts)} bundles and {len(use)} rows of "
      "slots; this libtpu writes another format"
    )
  depth = np.array([match.group(1).count(">") for match in starts])
  weight = _weights(name, depth, trips)
  ends = [*(m.start() for m in starts[1:]), len(bundles)]
  texts = [
    bundles[m.start() : end] for m, end in zip(starts, ends, strict=True)
  ]
  macs = _macs(texts, chip)
  inside = depth > 0
  return Schedule(
    name=name,
    slots=slots,
    capacity=capacity,
    use=use[inside],
    weight=weight[inside],
    macs=float((macs * weight)[inside].sum()),
    vmem=_vmem(folder, name),
  )


def _vmem(folder: pathlib.Path, name: str) -> int | None:
  """Sums all VMEM allocations: blocks twice, scratch, spills."""
  found = [f for f in folder.glob("*-post-ra.txt") if name in f.name]
  sizes = [
    _VMEM.findall(f.read_text()) for f in found if "bundle" not in f.name
  ]
  return max((sum(int(x, 16) for x in each) for each in sizes), default=None)


def _one(folder: pathlib.Path, name: str, pattern: str) -> pathlib.Path:
  found = [
    path
    for path in folder.glob(pattern)
    if name in path.name
    and "pre-delay" not in path.name
    and "schedule-analysis" not in path.name
  ]
  if len(found) != 1:
    raise ValueError(
      f"schedule of {name}: found {len(found)} files {pattern} in {folder}, "
      "expected one"
    )
  return found[0]


def _table(text: str) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
  lines = text.splitlines()
  slots = tuple(name.strip() for name in lines[1].split(","))
  rows = [line.split() for line in lines[4:] if line.strip()]
  return slots, np.array(lines[2].split(), int), np.array(rows, int)


def _weights(name, depth: np.ndarray, trips: tuple[int, ...]) -> np.ndarray:
  """Returns how often each bundle runs per grid step, which is depth 1."""
  weight = (depth > 0).astype(float)
  if depth.max() > 2:
    raise ValueError(f"schedule of {name}: loops inside loops of a grid step")
  starts = np.flatnonzero((depth == 2) & (np.roll(depth, 1) != 2))
  if len(starts) != len(trips):
    raise ValueError(
      f"schedule of {name}: found {len(starts)} loops inside a grid step, "
      f"expected {len(trips)}; their bodies cannot be counted"
    )
  for start, count in zip(starts, trips, strict=True):
    stop = start
    while stop < len(depth) and depth[stop] == 2:
      stop += 1
    weight[start:stop] = count
  return weight


def _macs(texts: list[str], chip: Chip) -> np.ndarray:
  """Returns the bf16 multiply-adds of each bundle.

  A matmul instruction streams 16 rows of bf16 or 8 of float32 through a matrix
  unit, 8 from a matrix register ("lmr"). How deep a unit of 256 is filled
  depends on how many registers of weights were pushed before: they are staged
  ("msr") and then loaded ("gmr").
  """
  macs = np.zeros(len(texts))
  staged, used = {}, {}
  for n, text in enumerate(texts):
    for what, tail in _MATRIX.findall(text):
      parts = tail.split(".")
      rows = 16 if "bf16" in parts and "lmr" not in parts else 8
      unit = next((x for x in parts if x.startswith("mxu")), "mxu")
      stage = next((x for x in parts if x.startswith("msr")), None)
      if what.startswith("vmatpush"):
        staged[unit, stage] = staged.get((unit, stage), 0) + rows
        continue
      if chip.mxu == FULL_DEPTH:
        macs[n] += rows * chip.mxu**2
        continue
      weights = next((x for x in parts if x.startswith("gmr")), None)
      if stage is not None:
        used[unit, weights] = min(staged.pop((unit, stage), 0), chip.mxu)
      macs[n] += rows * chip.mxu * used.get((unit, weights), chip.mxu)
  return macs
