"""Peak FLOP/s, memory and bandwidth of TPUs and GPUs, in one table.

TPUs: Cloud TPU documentation, the page of each version; links as in "How to
scale your model" (Austin et al. 2025), section on TPUs. GPUs: NVIDIA's data
sheets, without sparsity; links are NVLink's (600, 900, 900 and 1,800 GB/s both
ways), networks those of DGX systems (a port of 200 or 400 Gb/s for each GPU).
"""

import dataclasses

GIB = 2.0**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """Peak rates and memory of one chip; None where unknown.

  Attributes:
    name: Common name.
    memory: Main memory in bytes.
    kind: Device kind, as JAX calls it.
    flops: Peak bf16 FLOP/s, counting multiplies and adds.
    bandwidth: Main memory bandwidth in bytes/s.
    link: Bytes/s that a chip sends to others. TPUs: to the neighbours along one
      axis of the torus, both directions together. GPUs: by NVLink, within a
      host.
    network: Bytes/s that a chip sends to other hosts; None where links reach
      all chips.
  """

  name: str
  memory: float
  kind: str | None = None
  flops: float | None = None
  bandwidth: float | None = None
  link: float | None = None
  network: float | None = None


def _table(*rows) -> dict[str, Chip]:
  names = ("name", "kind", "memory", "flops", "bandwidth", "link", "network")
  return {row[0]: Chip(**dict(zip(names, row, strict=False))) for row in rows}


TPUS = _table(
  ("v4", "TPU v4", 32 * GIB, 275e12, 1.228e12, 9e10),
  ("v5e", "TPU v5 lite", 16 * GIB, 197e12, 0.819e12, 9e10),
  ("v5p", "TPU v5", 95 * GIB, 459e12, 2.765e12, 18e10),
  ("v6e", "TPU v6 lite", 32 * GIB, 918e12, 1.64e12, 18e10),
  ("tpu7x", "TPU7x", 192 * GIB, 2307e12, 7.38e12, 18e10),
)
GPUS = _table(
  ("a100", "NVIDIA A100-SXM4-80GB", 80 * GIB, 312e12, 2.039e12, 30e10, 25e9),
  ("h100", "NVIDIA H100 80GB HBM3", 80 * GIB, 989e12, 3.35e12, 45e10, 50e9),
  ("h200", "NVIDIA H200", 141e9, 989e12, 4.8e12, 45e10, 50e9),
  ("b200", "NVIDIA B200", 180e9, 2250e12, 8e12, 90e10, 50e9),
)
CHIPS = TPUS | GPUS
"""Chips by name."""


def find_by_kind(kind: str) -> Chip | None:
  """Returns the chip whose JAX device kind is `kind`, or None."""
  return next((c for c in CHIPS.values() if c.kind == kind), None)
