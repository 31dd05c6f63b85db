"""Two flat stages of a rate, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from research.optim import stages
from research.typing import UserError


def test_stages():
  rate = stages.stages(4.0, 1.0, 4, steps=10, warmup=2, decay=2, final=0.1)
  want = [2, 4, 4, 4, 1, 1, 1, 1, 1, 0.55, 0.1]
  got = [float(rate(jnp.int32(i))) for i in range(len(want))]
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_llada_s():
  """2.3 T tokens in batches of 1,280 rows of 4,096."""
  rate = stages.stages(
    4e-4, 1e-4, 229_000, 440_000, warmup=2000, decay=57_000, final=0.1
  )
  tokens = 1280 * 4096
  for read, want in ((0.5e12, 4e-4), (1.19e12, 4e-4), (1.21e12, 1e-4)):
    assert float(rate(jnp.int32(read / tokens))) == pytest.approx(want)
  assert float(rate(jnp.int32(1.99e12 / tokens))) == pytest.approx(1e-4)
  assert float(rate(jnp.int32(440_000))) == pytest.approx(1e-5)


@pytest.mark.parametrize("at", [1, 8])
def test_no_room(at):
  with pytest.raises(UserError, match=f"begins at {at}, expected from 2"):
    stages.stages(1.0, 0.1, at, steps=10, warmup=2, decay=2)
