"""Measures a job: compiles it, reads its schedules, checks them, predicts."""

import dataclasses
import pathlib
import tempfile

from kernels_pallas.inspect import build, chips, schedule
from kernels_pallas.inspect.build import Job

# Which kernels a direction is made of: (name, matmuls a score element).
KERNELS = {
  ("ours", "forward"): (("flash_attention_forward", 2),),
  ("ours", "fused"): (("flash_attention_fused", 5),),
  ("ours", "split"): (("flash_attention_dkv", 4), ("flash_attention_dq", 3)),
  ("splash", "forward"): (("splash_mha_fwd", 2),),
  ("splash", "fused"): (("splash_mha_dkv", 5),),
  ("splash", "split"): (("splash_mha_dkv", 4), ("splash_mha_dq", 3)),
}
CREDITED = {"forward": 2, "backward": 5}
TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True)
class Measurement:
  """What a job costs.

  Attributes:
    job: What was compiled.
    schedules: Of its kernels.
    bundles: For 1000 score elements, of all kernels.
    executed: Matmuls a score element that run.
  """

  job: Job
  schedules: tuple[schedule.Schedule, ...]
  bundles: float
  executed: int

  @property
  def chip(self) -> chips.Chip:
    """The generation."""
    return chips.CHIPS[self.job.target]

  @property
  def tflops(self) -> float:
    """Predicted TFLOP/s of a chip."""
    credited = CREDITED[self.job.direction]
    return chips.tflops(
      self.chip, self.job.head_dim, credited, self.executed, self.bundles
    )

  @property
  def roofline_share(self) -> float:
    """Of the bound that the matrix units set, which is reached."""
    credited = CREDITED[self.job.direction]
    least = chips.bound(self.chip, self.job.head_dim, credited)
    return min(1.0, least / self.bundles)

  @property
  def spills(self) -> int:
    """Registers written to memory for want of one, a grid step, all kernels."""
    return sum(s.spills() for s in self.schedules)

  def limiting(self) -> tuple[str, float]:
    """The fullest slot, and how full it is."""
    shares = [
      max(s.share().items(), key=lambda x: x[1]) for s in self.schedules
    ]
    return max(shares, key=lambda x: x[1])


def measure(job: Job, keep: pathlib.Path | None = None) -> Measurement:
  """Compiles `job` and reads what it costs.

  Args:
    job: What to compile.
    keep: A folder for libtpu's dumps, which else are deleted.

  Raises:
    ValueError: The compiler refuses, or the matrix work in the schedule is not
      that of the algorithm within 1%.
  """
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch) if keep is None else keep
    problem = build.compile_to(job, folder)
    if problem is not None:
      raise ValueError(f"{job.maker} {job.blocks}: does not compile: {problem}")
    return _read(job, folder)


def _read(job: Job, folder: pathlib.Path) -> Measurement:
  organisation = job.direction
  if organisation == "backward":
    fused = job.blocks[3] if job.maker == "splash" else job.backward == "fused"
    organisation = "fused" if fused else "split"
  found, bundles, executed = [], 0.0, 0
  for name, matmuls in KERNELS[job.maker, organisation]:
    this = schedule.read(folder, name, chips.CHIPS[job.target])
    elements = job.blocks[0] * job.blocks[1]
    work = this.macs / elements / job.head_dim
    if not _adds_up(work, matmuls, job):
      raise ValueError(
        f"{name}: found the work of {work:.2f} matmuls a grid step, expected "
        f"{matmuls}; its bundles say nothing"
      )
    found.append(this)
    bundles += 1000 * this.bundles / elements
    executed += matmuls
  return Measurement(job, tuple(found), bundles, executed)


def _adds_up(work: float, matmuls: int, job: Job) -> bool:
  """Whether `work` is that of `matmuls` matmuls, within 1%.

  A matmul counts 2, 4, ... times where the head dim fills 1/2, 1/4, ... of a
  matrix unit: the rest of the unit multiplies zeros.
  """
  most = max(1, chips.CHIPS[job.target].mxu // job.head_dim)
  counts, sums = [2**n for n in range(most.bit_length())], {0}
  for _ in range(matmuls):
    sums = {s + count for s in sums for count in counts}
  return any(abs(work / s - 1) <= TOLERANCE for s in sums)
