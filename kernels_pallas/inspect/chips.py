"""TPU generations; predictions from schedules (kernels_pallas/MATH.md 7)."""

import dataclasses

from kernels_pallas.common import chips


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU generation, as its compiler and its schedules see it.

  Attributes:
    spec: Its data sheet.
    topology: Name of its smallest topology.
    cores: Cores per chip.
    clock: Clock of a core in Hz. Implied by the peak; v6e's is assumed, and
    fits.
    mxu: Rows and columns of a matrix unit.
  """

  spec: chips.Chip
  topology: str
  cores: int
  clock: float
  mxu: int

  @property
  def kind(self) -> str:
    """Device kind, as libtpu calls it."""
    return self.spec.kind

  @property
  def peak(self) -> float:
    """Peak bf16 FLOP/s of a chip."""
    return self.spec.flops

  @property
  def bandwidth(self) -> float:
    """HBM bandwidth of a chip in bytes/s."""
    return self.spec.bandwidth

  @property
  def flops_per_cycle(self) -> float:
    """Peak bf16 FLOPs per cycle and core."""
    return self.peak / self.cores / self.clock


CHIPS = {
  name: Chip(chips.TPUS[name], *facts)
  for name, facts in {
    "v4": ("v4:2x2x1", 2, 1.05e9, 128),
    "v5e": ("v5e:1x1", 1, 1.5e9, 128),
    "v5p": ("v5p:2x2x1", 2, 1.75e9, 128),
    "v6e": ("v6e:1x1", 1, 1.75e9, 256),
    "tpu7x": ("tpu7x:2x2x1", 2, 2.2e9, 256),
  }.items()
}


def bound(chip: Chip, head_dim: int, matmuls: int) -> float:
  """Returns the fewest bundles per 1000 score elements, matrix units always
  busy.

  A head dim that does not fill a matrix unit wastes the rest of it.

  Args:
    chip: The generation.
    head_dim: Length of the contraction, or width of the result.
    matmuls: Matmuls per score element.
  """
  filled = -(-head_dim // chip.mxu) * chip.mxu
  return 1000 * matmuls * 2 * filled / chip.flops_per_cycle


def memory_cycles(chip: Chip, size: int) -> float:
  """Returns the cycles to read `size` bytes from HBM, while all cores read."""
  return size / (chip.bandwidth / chip.cores) * chip.clock


def tflops(
  chip: Chip, head_dim: int, credited: int, executed: int, cycles: float
) -> float:
  """Predicts a chip's TFLOP/s from cycles per 1000 score elements.

  Args:
    chip: The generation.
    head_dim: Head dim of q, k and v.
    credited: Matmuls per score element that count as work.
    executed: Matmuls that run; a schedule cannot be faster than their FLOPs.
    cycles: Cycles of all kernels, per 1000 score elements.
  """
  least = 1000 * executed * 2 * head_dim / chip.flops_per_cycle
  cycles = max(cycles, least) / 1000
  return credited * 2 * head_dim / cycles * chip.clock * chip.cores / 1e12
