"""Measures a job: compiles it, parses and checks its schedules, predicts."""

import dataclasses
import pathlib
import tempfile

from kernels_pallas.inspect import build, chips, schedule
from kernels_pallas.inspect.programs import Job, Step

TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True)
class Measurement:
  """The cost of a job.

  Attributes:
    job: What was compiled.
    schedules: Schedules of its kernels.
    bundles: Bundles of all kernels, per 1000 score elements.
    cycles: Cycles per 1000 score elements: one per bundle, or the memory's.
    executed: Matmuls per score element that run.
  """

  job: Job
  schedules: tuple[schedule.Schedule, ...]
  bundles: float
  cycles: float
  executed: int

  @property
  def tflops(self) -> float:
    """Predicted TFLOP/s of a chip."""
    return chips.tflops(
      self.job.chip,
      self.job.head_dim,
      self.job.program.credited[self.job.direction],
      self.executed,
      self.cycles,
    )

  @property
  def roofline_share(self) -> float:
    """Fraction of the matrix units' bound that is reached."""
    credited = self.job.program.credited[self.job.direction]
    least = chips.bound(self.job.chip, self.job.head_dim, credited)
    return min(1.0, least / self.bundles)

  @property
  def spills(self) -> int:
    """Register spills per grid step, over all kernels."""
    return sum(s.spills() for s in self.schedules)

  @property
  def vmem(self) -> int | None:
    """Bytes of VMEM of the kernel with the most, if libtpu reports it."""
    found = [s.vmem for s in self.schedules if s.vmem is not None]
    return max(found, default=None)

  def limiting(self) -> tuple[str, float]:
    """Returns the fullest slot, and how full it is."""
    shares = [
      max(s.share().items(), key=lambda x: x[1]) for s in self.schedules
    ]
    return max(shares, key=lambda x: x[1])


def measure(job: Job, keep: pathlib.Path | None = None) -> Measurement:
  """Compiles `job` and measures its cost.

  Args:
    job: What to compile.
    keep: Folder for libtpu's dumps; by default they are deleted.

  Raises:
    ValueError: Compilation fails, or the matrix work in the schedule differs
      from that of the algorithm by more than 1%.
  """
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch) if keep is None else keep
    problem = build.compile_to(job, folder)
    if problem is not None:
      raise ValueError(f"{job.maker} {job.blocks}: does not compile: {problem}")
    return _read(job, folder)


def _read(job: Job, folder: pathlib.Path) -> Measurement:
  found, bundles, cycles, executed = [], 0.0, 0.0, 0
  for step in job.program.steps(job):
    this = schedule.read(folder, step.name, job.chip, step.trips)
    work = this.macs / step.elements / step.depth
    if not _adds_up(work, step, job.chip):
      raise ValueError(
        f"{step.name}: found the work of {work:.2f} matmuls a grid step, "
        f"expected {step.units(job.chip.mxu):g}, padding included; its bundles "
        "say nothing"
      )
    found.append(this)
    bundles += 1000 * this.bundles / step.elements
    memory = chips.memory_cycles(job.chip, step.bytes)
    cycles += 1000 * max(this.bundles, memory) / step.elements
    executed += len(step.matmuls)
  return Measurement(job, tuple(found), bundles, cycles, executed)


def _adds_up(work: float, step: Step, chip: chips.Chip) -> bool:
  """Whether `work` equals that of the step's matmuls and padding, within 1%."""
  return abs(work / step.units(chip.mxu) - 1) <= TOLERANCE
