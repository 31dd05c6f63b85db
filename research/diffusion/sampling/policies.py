"""Which candidates of a step are kept: policies of one sampling loop.

A policy is a value with one method, which sees how sure the model is of each
place and says which places to fill. It knows nothing of models, blocks, caches
or tokens; a new one is one function.

  commit(confidence [B, K], eligible [B, K], quota [B]) -> places [B, K]

At least one eligible place a row is kept, so that every loop ends. Ties go to
the lower place. Commands define flags from the fields of policies: JAX is
imported when they are used.
"""

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

from research.ranges import (
  Decay,
  NonNegativeFloat,
  PositiveFloat,
  PositiveShare,
  Ranged,
)


@runtime_checkable
class Policy(Protocol):
  """How many, and which."""

  def commit(self, confidence: Any, eligible: Any, quota: Any) -> Any:
    """Returns which eligible places are filled now, `[B, K]`.

    Args:
      confidence: that of each candidate, `[B, K]`.
      eligible: places that are masked, and in the block, `[B, K]`.
      quota: how many the schedule of steps would fill, of each row, `[B]`.
    """

  @property
  def needs_probabilities(self) -> bool:
    """Whether confidences are compared with a probability, not only ranked."""

  @property
  def uses_quota(self) -> bool:
    """Whether the plan of steps has a say; else steps are as many as needed."""


def ranks(confidence: Any, eligible: Any) -> Any:
  """Returns each place's rank by confidence, eligible ones first, from 0.

  Args:
    confidence, eligible: see `Policy.commit`.
  """
  import jax.numpy as jnp

  from research.diffusion import process

  return process.ranks(jnp.where(eligible, -confidence, jnp.inf))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quota:
  """The surest `quota` places (LLaDA, arXiv:2502.09992)."""

  needs_probabilities: ClassVar[bool] = False
  uses_quota: ClassVar[bool] = True

  def commit(self, confidence, eligible, quota):
    return eligible & (ranks(confidence, eligible) < quota[:, None])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold(Ranged):
  """All places at least this sure, and always the surest one.

  Wu et al. 2025 (Fast-dLLM, arXiv:2505.22618), section 3.3.

  Attributes:
    threshold: tau.
    quota_first: keep at least the schedule's quota, as LLaDA 2 does.
  """

  threshold: PositiveShare = 0.9
  quota_first: bool = False
  needs_probabilities: ClassVar[bool] = True

  @property
  def uses_quota(self) -> bool:
    return self.quota_first

  def commit(self, confidence, eligible, quota):
    rank = ranks(confidence, eligible)
    kept = (confidence >= self.threshold) | (rank == 0)
    if self.quota_first:
      kept |= rank < quota[:, None]
    return eligible & kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credit(Threshold):
  """A threshold on confidences that earlier steps have raised (dInfer).

  What a place was likely to be at earlier steps counts, too: `credit.Credited`
  adds it to the logits, from these numbers.

  Attributes:
    threshold: tau.
    alpha: how much credit counts.
    beta: the share of it that is left at the next step.
    gamma: the power of a first choice's probability that it earns.
  """

  alpha: NonNegativeFloat = 0.7
  beta: Decay = 0.8
  gamma: NonNegativeFloat = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factor(Ranged):
  """As many of the surest as an error of `factor` allows.

  The r-th surest, from 1, needs a confidence of `1 - factor / (r + 1)`, and
  all before it theirs (Fast-dLLM, theorem 1: the product of marginals and the
  joint distribution then have the same mode).

  Attributes:
    factor: f; 1 is what the theorem asks.
  """

  factor: PositiveFloat = 1.0
  needs_probabilities: ClassVar[bool] = True
  uses_quota: ClassVar[bool] = False

  def commit(self, confidence, eligible, quota):
    rank = ranks(confidence, eligible)
    enough = confidence >= 1 - self.factor / (rank + 2)
    enough |= rank == 0
    # The longest run of ranks that all are sure enough.
    fails = eligible & ~enough
    first = rank.min(-1, keepdims=True, where=fails, initial=rank.shape[-1])
    return eligible & (rank < first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hierarchy(Ranged):
  """The surest place of each run of masks, if sure enough (dInfer).

  Attributes:
    threshold: what any place needs.
    low: what the surest of a run needs.
  """

  threshold: PositiveShare = 0.92
  low: PositiveShare = 0.62
  needs_probabilities: ClassVar[bool] = True
  uses_quota: ClassVar[bool] = False

  def commit(self, confidence, eligible, quota):
    import jax.numpy as jnp

    known = jnp.where(eligible, confidence, -jnp.inf)
    start = eligible & ~jnp.pad(eligible, ((0, 0), (1, 0)))[:, :-1]
    run = jnp.where(eligible, jnp.cumsum(start, axis=-1), 0)
    same = run[:, :, None] == run[:, None, :]
    rival = jnp.where(same & eligible[:, None, :], known[:, None, :], -jnp.inf)
    place = jnp.arange(run.shape[-1])
    ahead = (rival > known[:, :, None]) | (
      (rival == known[:, :, None]) & (place < place[:, None])
    )
    best = eligible & ~jnp.any(ahead & same & eligible[:, None, :], axis=-1)
    kept = (best & (confidence > self.low)) | (confidence > self.threshold)
    kept &= eligible
    first = ranks(confidence, eligible) == 0
    return kept | (eligible & first & ~kept.any(-1, keepdims=True))
