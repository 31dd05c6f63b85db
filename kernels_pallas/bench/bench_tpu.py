"""Checks and benchmarks our TPU kernels on the attached TPU.

    python -m kernels_pallas.bench.bench_tpu --to=tpu.jsonl --budget=540

is the TPU version of `bench_gpu`, with JAX's splash, flash and paged attention,
and XLA's matmul with bfloat16 weights, as baselines.
"""

import sys

from kernels_pallas.bench import supervisor
from kernels_pallas.bench.bench_gpu import jobs


def main(arguments: list[str] | None = None) -> int:
  """Checks and benchmarks the kernels on the attached TPU, in lines of JSON."""
  about = main.__doc__
  return supervisor.main(
    "kernels_pallas.bench.bench_tpu", "tpu", jobs, arguments, about
  )


if __name__ == "__main__":
  sys.exit(main())
