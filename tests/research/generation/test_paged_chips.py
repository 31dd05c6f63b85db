"""Paged decoding, compiled for chips that are not installed."""

import collections
import re

import pytest

from kernels_pallas.inspect import gpu
from research.generation.generate_paged import PREFILL_SIZES
from research.planning import chips
from tests.research.nn import chips_paged
from tests.research.nn.chips_paged import COUNT, DEPTH, SIZE

pytestmark = pytest.mark.chips


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_tpus_programs_append_and_attend_by_kernels_in_place(dtype):
  device = chips.topology("v5e:1x1").devices[0]
  for program in chips_paged.lowered(device, dtype):
    compiled = program.compile()
    text = compiled.as_text()
    names = re.findall(r'kernel_name = "(\w+)"', program.as_text())
    found = collections.Counter(names)
    assert found["append_to_pages"] == found["decode_attention"] == DEPTH
    calls = len(re.findall(r'custom_call_target="tpu_custom_call"', text))
    assert calls == sum(found.values())
    # A layer's pages, which are copied nowhere.
    shape = f"{COUNT},2,{SIZE},256"
    assert f"[{shape}]" in text
    copies = rf"= \w+\[(1,)?{shape}\]\S* copy(?:-start)?\("
    assert not re.findall(copies, text)


@pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))
def test_a_gpus_programs_attend_by_kernels_in_place():
  found = gpu.compiled(["tests.research.nn.chips_paged", "h100", "bfloat16"])
  assert len(found) == 1 + len(PREFILL_SIZES)
  for kernel in found:
    assert "decode_attention" in kernel.name
    assert kernel.spills == 0 and not kernel.warnings
