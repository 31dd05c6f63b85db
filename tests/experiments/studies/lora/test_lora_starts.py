"""Starts that are timed are starts of the method, on all its matrices."""

import numpy as np
import pytest

from experiments.studies.lora import lora_starts
from research.nn import presets

SIZES = presets.Sizes(
  vocab=16,
  width=32,
  depth=1,
  heads=2,
  kv_heads=1,
  head_dim=16,
  hidden=48,
  tied=True,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LoRA", "CorDA"])
def test_times_both_calls(name):
  found = lora_starts.timed(name, lora_starts.drawn(SIZES))
  assert list(found) == [
    *("first", "first, processor", "again", "again, processor")
  ]
  assert found["first"] >= found["again"] >= 0


def test_covariances_are_some():
  c = lora_starts._random_statistic("covariance", (32, 16))
  assert c.shape == (32, 32)
  assert np.linalg.eigvalsh(c.astype(np.float64)).min() > 0
