"""Credit of steps against loops over single answers."""

import jax.numpy as jnp
import numpy as np
import pytest

from research.training.alignment.process_rewards import (
  ProcessAdvantages,
  SoftMin,
  StandardizedSteps,
  as_given,
  min_to_go,
  no_baseline,
  others_per_step,
  over_tokens,
  progress,
  sum_to_go,
)
from research.typing import UserError

P, G, S = 2, 3, 5
COUNTS = np.array([[5, 3, 1], [2, 4, 0]])


def rewards(seed=0):
  """Returns rewards, garbage where there is no step, and which exist."""
  rng = np.random.default_rng(seed)
  found = rng.uniform(-1, 1, (P, G, S)).astype(np.float32)
  real = np.arange(S) < COUNTS[..., None]
  return np.where(real, found, 7.0).astype(np.float32), real


def each(f):
  """Returns `f(one answer's rewards)` for all, padded with zeros."""
  values, _ = rewards()
  out = np.zeros((P, G, S))
  for p, g in np.ndindex(P, G):
    n = COUNTS[p, g]
    out[p, g, :n] = f(values[p, g, :n].astype(np.float64))
  return out


def check(found, want):
  np.testing.assert_allclose(found, want, atol=1e-5)


def test_returns_are_of_the_steps_to_come():
  values, real = map(jnp.asarray, rewards())
  check(sum_to_go(values, real), each(lambda r: np.cumsum(r[::-1])[::-1]))
  check(
    min_to_go(values, real), each(lambda r: [min(r[i:]) for i in range(len(r))])
  )


def test_softmin_tends_to_the_worst_step_and_blames_nothing_after_it():
  values, real = map(jnp.asarray, rewards())

  def soft(t):
    def one(r):
      w = np.exp(-r / t)
      return np.cumsum((w / w.sum() * r)[::-1])[::-1]

    return one

  found = sum_to_go(SoftMin(temperature=0.1)(values, real), real)
  check(found, each(soft(0.1)))

  def hard(r):
    if not len(r):
      return r
    return np.where(np.arange(len(r)) <= np.argmin(r), r.min(), 0.0)

  cold = sum_to_go(SoftMin(temperature=1e-3)(values, real), real)
  check(cold, each(hard))


def test_grpo_s_process_supervision():
  """DeepSeekMath 4.1.3: over all steps of a group, then summed to the end."""
  values, real = rewards()
  want = np.zeros((P, G, S))
  for p in range(P):
    every = values[p][real[p]].astype(np.float64)
    for g in range(G):
      r = (values[p, g, : COUNTS[p, g]] - every.mean()) / (every.std() + 1e-4)
      want[p, g, : COUNTS[p, g]] = np.cumsum(r[::-1])[::-1]
  how = ProcessAdvantages(weighting=as_given, baseline=StandardizedSteps())
  check(how(jnp.asarray(values), jnp.asarray(real)), want)
  equal = jnp.full((1, 2, 3), 0.1)
  np.testing.assert_array_equal(how(equal, equal > 0), 0)


def test_pure_s_baseline_is_the_others_reward_a_step():
  values, real = rewards()
  weighted = np.asarray(SoftMin()(jnp.asarray(values), jnp.asarray(real)))
  want = np.zeros((P, G, S))
  for p, g in np.ndindex(P, G):
    n = COUNTS[p, g]
    others = [
      weighted[p, h, : COUNTS[p, h]].mean() if COUNTS[p, h] else 0.0
      for h in range(G)
      if h != g
    ]
    r = weighted[p, g, :n] - np.mean(others)
    want[p, g, :n] = np.cumsum(r[::-1])[::-1]
  found = ProcessAdvantages()(jnp.asarray(values), jnp.asarray(real))
  check(found, want)
  plain = ProcessAdvantages(baseline=no_baseline)
  check(
    plain(jnp.asarray(values), jnp.asarray(real)),
    sum_to_go(jnp.asarray(weighted), jnp.asarray(real)),
  )


def test_progress_sums_to_what_the_answer_gained():
  values = jnp.array([[0.5, 0.25, 1.0], [0.0, 0.0, 9.0]])
  real = jnp.array([[True, True, True], [True, True, False]])
  found = progress(values, jnp.array([0.25, 0.5]), real)
  check(found, [[0.25, -0.25, 0.75], [-0.5, 0.0, 0.0]])


def test_tokens_have_their_step_s_advantage():
  steps = jnp.array([[1.0, 2.0], [3.0, 4.0]])
  index = jnp.array([[-1, 0, 0, 1], [0, 1, 1, -1]])
  check(over_tokens(steps, index), [[0, 1, 1, 2], [3, 4, 4, 0]])


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: SoftMin(temperature=0.0), "SoftMin.temperature: found 0.0"),
    (
      lambda: others_per_step(jnp.ones((1, 1, 2)), jnp.ones((1, 1, 2), bool)),
      "groups of 1, expected at least 2",
    ),
  ],
)
def test_mistakes(make, message):
  with pytest.raises(UserError, match=message):
    make()
