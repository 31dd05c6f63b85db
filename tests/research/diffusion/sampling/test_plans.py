"""How many places a step fills by plan, and which ones by chance."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.diffusion.sampling import policies
from research.diffusion.sampling.candidates import candidates, quota, shares_of
from research.diffusion.sampling.config import (
  POLICIES,
  SamplerConfig,
)
from research.diffusion.sampling.policies import (
  Factor,
  Hierarchy,
  Quota,
  Threshold,
)
from research.generation.sampling import GREEDY
from research.typing import UserError
from tests.research.diffusion.sampling.test_sampler import run


def planned(plan, count, steps):
  """Returns what each step of a block fills, as the loop asks for it."""
  options = SamplerConfig(
    mask_id=9, length=count, block=count, steps=steps, plan=plan
  )
  left, out = count, []
  whole = jnp.array([count])
  for i in range(steps):
    out.append(int(quota(options, whole, jnp.array([left]), i)[0]))
    left -= out[-1]
  assert left == 0
  return out


@pytest.mark.parametrize(
  ("plan", "count", "steps", "want"),
  [
    ("even", 10, 4, [3, 3, 2, 2]),
    ("even", 5, 3, [2, 2, 1]),
    ("even", 7, 16, [1] * 7 + [0] * 9),
    ("even", 128, 32, [4] * 32),
    ("linear", 10, 4, [2, 3, 2, 3]),
    ("linear", 4, 3, [1, 2, 1]),
    ("cosine", 16, 4, [1, 4, 5, 6]),
    ("cosine", 32, 8, [1, 2, 3, 4, 5, 5, 6, 6]),
  ],
)
def test_plans(plan, count, steps, want):
  assert planned(plan, count, steps) == want


@pytest.mark.parametrize(("count", "steps"), [(8, 4), (32, 7), (100, 64)])
def test_dream_s_plan_is_its_own_loop(count, steps):
  """n(1 - s/t), rounded down, on times from 1 to 0.001; the rest at last."""
  times, left, want = np.linspace(1, 1e-3, steps + 1), count, []
  for i in range(steps):
    some = int(left * (1 - times[i + 1] / times[i]))
    want.append(some if i < steps - 1 else left)
    left -= want[-1]
  assert planned("dream", count, steps) == want
  assert count != 8 or want == [1, 2, 2, 3]


@pytest.mark.parametrize("plan", ["dream", "linear", "cosine"])
def test_every_plan_fills_everything(plan):
  got = run(prompts=[(2, 5, 1), (4,)], block=8, steps=4, plan=plan)
  assert (got.tokens[:, 3:] != 7).all()
  assert got.calls <= 4


def test_a_new_policy_is_one_function():
  """That of the README."""

  @dataclasses.dataclass(frozen=True)
  class Half:
    needs_probabilities = False
    uses_quota = False

    def commit(self, confidence, eligible, quota):
      some = -(-eligible.sum(-1) // 2)
      return eligible & (policies.ranks(confidence, eligible) < some[:, None])

  got = run(block=8, policy=Half())
  assert got.calls == 4
  np.testing.assert_array_equal(np.bincount(got.filled[0, 3:]), [4, 2, 1, 1])


def test_places_are_drawn_without_replacement():
  """The first of two places, as often as softmax(confidence / T) says."""
  n, temperature = 20_000, 0.5
  options = SamplerConfig(
    mask_id=4, length=3, block=3, select="max", place_temperature=temperature
  )
  logits = jnp.asarray([[2.0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [3, 0, 0, 0, 0]])
  keys = jax.random.split(jax.random.key(0), n)
  _, sure, _ = jax.jit(candidates, static_argnums=(2,))(
    jnp.broadcast_to(logits, (n, 3, 5)), keys, options, GREEDY
  )
  best = np.exp([2.0, 1, 3])
  confidence = best / (best + 3)  # the mask has none
  want = np.exp(confidence / temperature)
  want /= want.sum()
  order = np.asarray(policies.ranks(sure, jnp.ones((n, 3), bool)))
  for place in range(3):
    first = order[:, place] == 0
    assert abs(first.mean() - want[place]) < 4.5 * 0.5 / np.sqrt(n)
    other = (place + 1) % 3
    second = (order[first, other] == 1).mean()
    p = want[other] / (1 - want[place])
    assert abs(second - p) < 4.5 * 0.5 / np.sqrt(first.sum())


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      dict(place_temperature=0.0),
      "place_temperature=0.0: expected more than 0",
    ),
    (
      dict(place_temperature=1.0, policy=Threshold()),
      "place_temperature=1.0: policy=threshold:0.9 judges how sure",
    ),
    (
      dict(place_temperature=1.0, select="random"),
      "place_temperature=1.0: has no effect with select=random",
    ),
    (
      dict(policy=Factor(), plan="cosine"),
      "plan=cosine: policy=factor:1 has no plan; expected policy=quota",
    ),
    (
      dict(policy=Hierarchy(), steps=4),
      "steps=4: policy=hierarchy:0.92 chooses the number of steps",
    ),
    (
      dict(policy=Threshold(), steps=4),
      "steps=4: policy=threshold:0.9 chooses",
    ),
    (dict(ends="last"), "ends=last: has no effect, as no token is named"),
  ],
)
def test_mistakes(change, message):
  with pytest.raises(UserError, match=message):
    SamplerConfig(mask_id=9, length=8, block=8, **change)
  assert SamplerConfig(mask_id=9, length=8, block=8, policy=Quota())
  with pytest.raises(UserError, match="shape is 'square'"):
    shares_of("square", 3)


@pytest.mark.parametrize(
  "policy",
  [Threshold(), Threshold(quota_first=True), Factor(), Hierarchy()],
  ids=str,
)
def test_policies_that_need_probabilities(policy):
  """By chance they are a lottery, by entropy one place a call."""
  name = re.escape(POLICIES.text(policy))
  for select in ("random", "entropy"):
    with pytest.raises(
      UserError,
      match=f"select={select}: policy={name} compares confidences",
    ):
      SamplerConfig(mask_id=9, length=8, block=8, policy=policy, select=select)
    assert SamplerConfig(mask_id=9, length=8, block=8, select=select)
  for select in ("candidate", "max", "margin"):
    assert SamplerConfig(
      mask_id=9, length=8, block=8, policy=policy, select=select
    )
