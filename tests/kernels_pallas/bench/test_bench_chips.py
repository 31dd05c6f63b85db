"""The benchmarks' programs compile for chips that are not present."""

import pytest

from kernels_pallas.inspect import gpu
from tests.kernels_pallas import chips_bench

pytestmark = pytest.mark.chips

SMOKE = "^(decode/(cache|pages)$|append/|attention/causal/|sequence/parts)"


@pytest.mark.parametrize(
  "only", [SMOKE, pytest.param("", marks=pytest.mark.slow)], ids=["", "all"]
)
@pytest.mark.parametrize("chip", ["h100", "v5e"])
def test_every_job_compiles(chip, only):
  if chip == "h100" and gpu.missing() is not None:
    pytest.skip(gpu.missing())
  found = chips_bench.compiled(chip, only)
  assert len(found) > 6
  assert not [line for line in found if not line["ok"]]
  appended = [line for line in found if "held" in line]
  assert len(appended) == 3
  for line in appended:
    # Bytes of the new tokens, not of the pages.
    assert line["in_place"] >= line["held"] > 4 * line["temporary"]
