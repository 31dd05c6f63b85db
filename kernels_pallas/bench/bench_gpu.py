"""Our GPU kernels on the GPU at hand: right first, then fast.

    python -m kernels_pallas.bench.bench_gpu --to=gpu.jsonl --budget=540

needs this package and JAX; it installs nothing. One call of each kernel comes
first, then every check, the cheapest first, then times beside cuDNN, jax's own
kernels and, where `flash_attn_jax` is installed, FlashAttention. Every job is a
line of JSON as soon as it has ended, and the last line sums up; one that fails,
hangs or takes its process along says so, and the others go on. With the same
file again, what it has is not run again. `--dry-run` walks all of it on the CPU
with tiny shapes, the kernels in the interpreter.
"""

import sys
from typing import Any

from kernels_pallas.bench import supervisor


def jobs(target: Any) -> list[Any]:
  """All checks and times of a chip.

  Args:
    target: A `bench.jobs.Target`.
  """
  from kernels_pallas.bench import attention, decoding, packed, sequence, times

  modules = (
    attention.checks, decoding.checks, packed.checks, sequence.checks,
    times.times, packed.times,
  )  # fmt: skip
  return [job for make in modules for job in make(target)]


def main(arguments: list[str] | None = None) -> int:
  """Checks and times the kernels on the GPU at hand, in lines of JSON."""
  about = main.__doc__
  return supervisor.main(
    "kernels_pallas.bench.bench_gpu", "gpu", jobs, arguments, about
  )


if __name__ == "__main__":
  sys.exit(main())
