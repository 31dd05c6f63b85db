"""Advantages from a reward for each step of an answer.

Rewards are `[P, G, S]`: S steps of each of G answers to P prompts, with `real`
for those that exist. A step's advantage is the sum of rewards from it on, after
two choices, each a value:

  weighting  what a step's reward counts: as it is, or `SoftMin`
  baseline   what is subtracted: nothing, the others' mean, or the group's

`as_given` with `StandardizedSteps` is GRPO with process supervision (Shao et
al. 2024, arXiv:2402.03300, section 4.1.3). `SoftMin` with `others_per_step` is
PURE (Cheng et al. 2025, arXiv:2504.15275): an answer is worth its worst step,
so the sum of future rewards, which pays for more steps, becomes their minimum.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.optim import ranges
from research.typing import Array, Bool, Float, Int, UserError

Weighting = Callable[
  [Float[Array, "P G S"], Bool[Array, "P G S"]], Float[Array, "P G S"]
]
"""`(rewards, real) -> rewards` that are summed to returns."""

Baseline = Weighting
"""`(rewards, real) -> rewards` less what was to be expected."""


def as_given(
  rewards: Float[Array, "*B S"], real: Bool[Array, "*B S"]
) -> Float[Array, "*B S"]:
  """Returns rewards as they are, 0 for steps that do not exist."""
  return jnp.where(real, rewards, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftMin:
  """Rewards weighted by how low they are: `softmax(-r / t) r`.

  Their sum from a step on tends, for a low temperature, to the answer's lowest
  reward at steps up to the lowest one, and to 0 after it:
  what comes after the mistake is not to blame.

  Attributes:
    temperature: t; the authors' code has 0.1 for rewards from -1 to 1.
  """

  temperature: float = 0.1

  def __post_init__(self):
    ranges.positive("SoftMin", temperature=self.temperature)

  def __call__(
    self, rewards: Float[Array, "*B S"], real: Bool[Array, "*B S"]
  ) -> Float[Array, "*B S"]:
    """Returns weighted rewards, 0 for steps that do not exist."""
    scores = jnp.where(real, -rewards / self.temperature, -jnp.inf)
    # An answer without steps has no largest score.
    scores = jnp.where(real.any(-1, keepdims=True), scores, 0.0)
    return jnp.where(real, jax.nn.softmax(scores, axis=-1) * rewards, 0.0)


def no_baseline(
  rewards: Float[Array, "P G S"], real: Bool[Array, "P G S"]
) -> Float[Array, "P G S"]:
  """Returns rewards as they are."""
  del real
  return rewards


def others_per_step(
  rewards: Float[Array, "P G S"], real: Bool[Array, "P G S"]
) -> Float[Array, "P G S"]:
  """Returns rewards less the others' mean reward a step.

  The baseline of a step is the mean over the group's other answers of their
  rewards' mean over steps.

  Raises:
    UserError: a group has one answer only.
  """
  count = rewards.shape[-2]
  if count < 2:
    raise UserError(
      f"others_per_step: found groups of {count}, expected at least 2 answers"
      " to a prompt."
    )
  mean = rewards.sum(-1) / jnp.maximum(real.sum(-1), 1)
  others = (mean.sum(-1, keepdims=True) - mean) / (count - 1)
  return jnp.where(real, rewards - others[..., None], 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardizedSteps:
  """Rewards less the mean of all steps of a group, over their deviation.

  Attributes:
    eps: added to the standard deviation.
  """

  eps: float = 1e-4

  def __post_init__(self):
    ranges.non_negative("StandardizedSteps", eps=self.eps)

  def __call__(
    self, rewards: Float[Array, "P G S"], real: Bool[Array, "P G S"]
  ) -> Float[Array, "P G S"]:
    """Returns standardized rewards, 0 for steps that do not exist."""
    count = jnp.maximum(real.sum((-2, -1), keepdims=True), 1)

    def mean(x):
      return jnp.where(real, x, 0.0).sum((-2, -1), keepdims=True) / count

    apart = rewards - mean(rewards)
    deviation = jnp.sqrt(mean(apart**2))
    least = jnp.where(real, rewards, jnp.inf).min((-2, -1), keepdims=True)
    most = jnp.where(real, rewards, -jnp.inf).max((-2, -1), keepdims=True)
    # A mean may be rounded: equal rewards must not become noise over eps.
    return jnp.where(real & (most > least), apart / (deviation + self.eps), 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessAdvantages:
  """Advantages of steps: rewards, weighted, compared, and summed to the end.

  Attributes:
    weighting: `as_given` or a `SoftMin`.
    baseline: `no_baseline`, `others_per_step` or a `StandardizedSteps`.
  """

  weighting: Weighting = SoftMin()
  baseline: Baseline = others_per_step

  def __call__(
    self, rewards: Float[Array, "P G S"], real: Bool[Array, "P G S"]
  ) -> Float[Array, "P G S"]:
    """Returns the advantage of each step."""
    return sum_to_go(self.baseline(self.weighting(rewards, real), real), real)


def sum_to_go(
  rewards: Float[Array, "*B S"], real: Bool[Array, "*B S"]
) -> Float[Array, "*B S"]:
  """Returns the sum of rewards from each step on, 0 where there is none."""
  total = jnp.cumsum(jnp.where(real, rewards, 0.0)[..., ::-1], axis=-1)
  return jnp.where(real, total[..., ::-1], 0.0)


def min_to_go(
  rewards: Float[Array, "*B S"], real: Bool[Array, "*B S"]
) -> Float[Array, "*B S"]:
  """Returns the lowest reward from each step on, 0 where there is none.

  The return of min-form credit assignment, exactly.
  """
  high = jnp.where(real, rewards, jnp.inf)[..., ::-1]
  low = jax.lax.cummin(high, axis=high.ndim - 1)[..., ::-1]
  return jnp.where(real, low, 0.0)


def progress(
  values: Float[Array, "*B S"],
  start: Float[Array, "*B"],
  real: Bool[Array, "*B S"],
) -> Float[Array, "*B S"]:
  """Returns how much each step raised the value, a prover's advantage.

  Setlur et al. 2024 (arXiv:2410.08146): `Q(s, a) - V(s)` of a prover, whose
  value after a step is known.

  Args:
    values: after each step, e.g. the share of a prover's rollouts that succeed.
    start: before the first one.
    real: which steps exist.
  """
  before = jnp.concatenate([start[..., None], values[..., :-1]], axis=-1)
  return jnp.where(real, values - before, 0.0)


def over_tokens(
  steps: Float[Array, "B S"], index: Int[Array, "B T"]
) -> Float[Array, "B T"]:
  """Returns each token's step's value.

  Args:
    steps: values of steps.
    index: of each token's step, -1 for tokens of none, which get 0.
  """
  found = jnp.take_along_axis(steps, jnp.maximum(index, 0), axis=1)
  return jnp.where(index >= 0, found, 0.0)
