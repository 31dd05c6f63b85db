"""Checks and benchmarks our GPU kernels on the attached GPU.

    python -m kernels_pallas.bench.bench_gpu --to=gpu.jsonl --budget=540

needs this package and JAX; it installs nothing. First runs one call of each
kernel, then every check, cheapest first, then benchmarks next to cuDNN, JAX's
own kernels and, if `flash_attn_jax` is installed, FlashAttention. Every job
prints a line of JSON when it ends, and the last line is a summary; a job that
fails, hangs or crashes its process is reported, and the others continue. Jobs
already in the given file are not run again. `--dry-run` runs everything on the
CPU with tiny shapes, the kernels in the interpreter.
"""

import sys
from typing import Any

from kernels_pallas.bench import supervisor


def jobs(target: Any) -> list[Any]:
  """Returns all checks and benchmarks of a chip.

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
  """Checks and benchmarks the kernels on the attached GPU, in lines of JSON."""
  about = main.__doc__
  return supervisor.main(
    "kernels_pallas.bench.bench_gpu", "gpu", jobs, arguments, about
  )


if __name__ == "__main__":
  sys.exit(main())
