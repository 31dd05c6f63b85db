"""Appending through the compiler for GPUs that are not here; its PTX in NumPy.

A scatter of XLA's is in place on a GPU, too, and fewer kernels, which is why
`auto` takes it: the test says when that changes.
"""

import dataclasses
import functools

import chex
import numpy as np
import pytest

from kernels_pallas.inspect import gpu
from tests.kernels_pallas import chips_append_gpu as chips

pytestmark = [
  pytest.mark.chips,
  pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing())),
]

measure = functools.cache(chips.measure)


@pytest.mark.parametrize("case", chips.TABLE, ids=str)
def test_the_instructions_write_what_a_scatter_does(case):
  (found,), text, said = measure(case)
  assert found.spills == 0 and not found.warnings
  assert said["in_place"] == said["pages"] > 4 * said["temporary"]
  found, held = chips.emulated(case, text), chips.arrays(case)[0]
  chex.assert_trees_all_equal(found, chips.expected(case))
  # 4 tokens and 2; one has no page, and 2 are nobody's.
  changed = np.asarray(found.kv != held.kv).any((1, 3))
  assert changed.sum() == 6


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_a_scatter_is_in_place_and_fewer_kernels(dtype):
  case = chips.Case("h100", dtype)
  _, _, ours = measure(case)
  _, _, plain = measure(dataclasses.replace(case, backend="xla"))
  assert plain["in_place"] == plain["pages"] > 4 * plain["temporary"]
  assert plain["kernels"] < ours["kernels"]
