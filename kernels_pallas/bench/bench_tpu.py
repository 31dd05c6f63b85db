"""Our TPU kernels on the TPU at hand: right first, then fast.

    python -m kernels_pallas.bench.bench_tpu --to=tpu.jsonl --budget=540

is for TPUs what `bench_gpu` is for GPUs; times are beside jax's splash, flash
and paged attention, and XLA's product with bfloat16 weights.
"""

import sys

from kernels_pallas.bench import supervisor
from kernels_pallas.bench.bench_gpu import jobs


def main(arguments: list[str] | None = None) -> int:
  """Checks and times the kernels on the TPU at hand, in lines of JSON."""
  about = main.__doc__
  return supervisor.main(
    "kernels_pallas.bench.bench_tpu", "tpu", jobs, arguments, about
  )


if __name__ == "__main__":
  sys.exit(main())
