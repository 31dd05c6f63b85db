"""Advantages by hand and by NumPy, and DAPO's punishment as TRL has it."""

import jax.numpy as jnp
import numpy as np
import pytest

from research.training.alignment import advantages
from research.training.alignment.advantages import (
  Standardized,
  centered,
  leave_one_out,
)
from research.training.alignment.overlong import (
  SoftOverlong,
  keep_overlong,
  mask_overlong,
)
from research.typing import UserError

REWARDS = jnp.array([[1.0, 0, 0, 1, 0, 0, 0, 0], [1.0] * 8, [0.1] * 8])


def test_a_group_s_deviation_is_the_population_s():
  """Two of eight are right: +1.732 and -0.577 (sample deviation: +1.620)."""
  found = Standardized(eps=0.0)(REWARDS)
  np.testing.assert_allclose(
    found[0], np.where(REWARDS[0] > 0, 1.732051, -0.577350), atol=1e-6
  )
  sample = Standardized(eps=0.0, ddof=1)(REWARDS)
  assert float(sample[0].max()) == pytest.approx(1.620185, abs=1e-6)
  want = (REWARDS[0] - 0.25) / (np.std(REWARDS[0]) + 1e-4)
  np.testing.assert_allclose(Standardized()(REWARDS)[0], want, rtol=1e-5)


@pytest.mark.parametrize("how", [centered, leave_one_out, Standardized()])
def test_equal_rewards_have_no_advantage(how):
  found = how(REWARDS)
  np.testing.assert_allclose(found[1:], 0, atol=2e-8)
  np.testing.assert_allclose(found.sum(-1), 0, atol=1e-5)
  np.testing.assert_array_equal(
    advantages.varied(REWARDS), [True, False, False]
  )
  assert advantages.every_group(REWARDS).all()


def test_leave_one_out_is_the_mean_of_the_others():
  rewards = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
  want = np.stack(
    [rewards[:, i] - np.delete(rewards, i, axis=1).mean(1) for i in range(5)],
    axis=1,
  )
  np.testing.assert_allclose(
    leave_one_out(jnp.asarray(rewards)), want, rtol=1e-4
  )
  np.testing.assert_allclose(
    centered(jnp.asarray(rewards)), want * 4 / 5, rtol=1e-4
  )


def test_overlong_answers():
  with np.load("tests/golden/alignment.npz") as file:
    want = file["overlong"]  # limit 20, buffer 8
  lengths = jnp.arange(1, len(want) + 1)
  ended, rewards = lengths < 20, jnp.ones(len(want))
  found, trained = SoftOverlong(limit=20, buffer=8)(rewards, lengths, ended)
  np.testing.assert_allclose(found - 1, want, atol=1e-7)
  assert trained.all()
  for how, kept in ((keep_overlong, True), (mask_overlong, ended)):
    found, trained = how(rewards, lengths, ended)
    np.testing.assert_array_equal(found, rewards)
    np.testing.assert_array_equal(trained, np.broadcast_to(kept, ended.shape))


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Standardized(ddof=1)(jnp.ones((2, 1))), "groups of 1, expected"),
    (lambda: leave_one_out(jnp.ones((2, 1))), "groups of 1, expected"),
    (
      lambda: SoftOverlong(limit=4, buffer=5),
      "buffer: found 5, expected 1 to 4",
    ),
  ],
)
def test_mistakes(make, message):
  with pytest.raises(UserError, match=message):
    make()
