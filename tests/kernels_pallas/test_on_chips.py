"""The benchmarks' checks as tests, on a machine with such a chip.

    pytest -m gpu tests/kernels_pallas
    pytest -m tpu tests/kernels_pallas

Nothing is interpreted there. `test_bench` runs the same jobs interpreted, and
`test_bench_chips` compiles them for absent chips.
"""

import jax
import pytest

from kernels_pallas.bench import bench_gpu, jobs
from kernels_pallas.bench.jobs import Target
from tests.support_gpu import needs_kernels

pytestmark = needs_kernels

KINDS = {"gpu": "NVIDIA H100 80GB HBM3", "tpu": "TPU v5 lite"}


def checks(platform, kind):
  """Returns a chip's checks, by name."""
  found = jobs.in_order(bench_gpu.jobs(Target(platform, kind)))
  return {job.name: job for job in found if job.stage != jobs.TIME}


@pytest.mark.parametrize(
  ("platform", "name"),
  [
    pytest.param(platform, name, marks=getattr(pytest.mark, platform), id=name)
    for platform, kind in KINDS.items()
    for name in checks(platform, kind)
  ],
)
def test_results_are_correct(platform, name):
  kind = jax.devices()[0].device_kind
  job = checks(platform, kind).get(name)
  if job is None:
    pytest.skip(f"{kind} has no such kernel")
  line = job.measure()
  assert line["ok"], line
