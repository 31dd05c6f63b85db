"""TPU generations, and what a schedule means on each (kernels.md 12.1, 15)."""

import dataclasses

from kernels_pallas.common import chips


@dataclasses.dataclass(frozen=True)
class Chip:
  """A generation, as its compiler and its schedules know it.

  Attributes:
    spec: Its data sheet.
    topology: Name of its smallest topology.
    cores: Cores a chip.
    clock: Hz of a core. Implied by the peak; v6e's is assumed, and fits.
    mxu: Rows and columns of a matrix unit.
  """

  spec: chips.Chip
  topology: str
  cores: int
  clock: float
  mxu: int

  @property
  def kind(self) -> str:
    """Device kind as libtpu calls it."""
    return self.spec.kind

  @property
  def peak(self) -> float:
    """bf16 FLOP/s of a chip."""
    return self.spec.flops

  @property
  def bandwidth(self) -> float:
    """HBM bytes/s of a chip."""
    return self.spec.bandwidth

  @property
  def flops_per_cycle(self) -> float:
    """bf16 FLOPs a cycle and core."""
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
  """Least bundles for 1000 score elements: matrix units busy all the time.

  A head dim that does not fill a matrix unit wastes the rest of it.

  Args:
    chip: The generation.
    head_dim: Length of the contraction, or width of the result.
    matmuls: Matmuls a score element.
  """
  filled = -(-head_dim // chip.mxu) * chip.mxu
  return 1000 * matmuls * 2 * filled / chip.flops_per_cycle


def memory_cycles(chip: Chip, size: int) -> float:
  """Cycles in which a core gets `size` bytes from HBM, all cores reading."""
  return size / (chip.bandwidth / chip.cores) * chip.clock


def tflops(
  chip: Chip, head_dim: int, credited: int, executed: int, cycles: float
) -> float:
  """Predicted TFLOP/s of a chip from cycles for 1000 score elements.

  Args:
    chip: The generation.
    head_dim: Of q, k and v.
    credited: Matmuls a score element that count as work.
    executed: Those that run; a schedule cannot be faster than their FLOPs.
    cycles: Of all kernels, for 1000 score elements.
  """
  least = 1000 * executed * 2 * head_dim / chip.flops_per_cycle
  cycles = max(cycles, least) / 1000
  return credited * 2 * head_dim / cycles * chip.clock * chip.cores / 1e12
