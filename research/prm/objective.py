"""Losses of reward models over labelled steps.

A batch is that of text, with `labels`, float32 `[B, T]`, and `weights`, above 0
at the last token of a labelled step and 0 elsewhere. What the labels mean is
theirs: the verdict of a person or an oracle (0 or 1), the share of rollouts
that succeed, or a value. Sums are divided by the weight of the whole batch,
over all devices and microbatches, so a trace of many steps counts as many.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from research import weights
from research.prm.model import GenerativeReward, RewardModel, log_odds
from research.ranges import NonNegativeFloat, Ranged
from research.training.objectives.objective import Batch, Sums
from research.typing import Array, Float, Int, Params, PRNGKey

StepLoss = Callable[
  [Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]],
  tuple[Float[Array, " B"], Float[Array, " B"]],
]
"""`(log-odds, labels, weights) -> (loss, weight)` of each row."""

Supervision = Callable[
  [Float[Array, "B T"], Float[Array, "B T"], Int[Array, "B T"]],
  tuple[Float[Array, "B T"], Float[Array, "B T"]],
]
"""`(labels, weights, segments) -> (labels, weights)` that are learned."""


NEVER = -1e30
"""Log of no mass at all; finite, so that gradients are."""


def soft(
  z: Float[Array, "B T"], labels: Float[Array, "B T"], w: Float[Array, "B T"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
  """Returns binary cross-entropy with labels from 0 to 1.

  Of labels 0 and 1 it is the usual one; of two logits it is that of their
  softmax.
  """
  return _weighted(jax.nn.softplus(z) - labels * z, w)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hard:
  """Binary cross-entropy with labels cut to 0 or 1.

  Attributes:
    threshold: a label above it is 1. Of shares of successful rollouts, 0 calls
      a step right that any rollout could finish (Math-Shepherd,
      arXiv:2312.08935, equation 3), the choice that worked best.
  """

  threshold: float = 0.0

  def __call__(
    self,
    z: Float[Array, "B T"],
    labels: Float[Array, "B T"],
    w: Float[Array, "B T"],
  ) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Returns each row's loss and weight."""
    return soft(z, (labels > self.threshold).astype(jnp.float32), w)


def squared_probability(
  z: Float[Array, "B T"], labels: Float[Array, "B T"], w: Float[Array, "B T"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
  """Returns the squared error of the probability (Brier's score)."""
  return _weighted((jax.nn.sigmoid(z) - labels) ** 2, w)


def squared_value(
  z: Float[Array, "B T"], labels: Float[Array, "B T"], w: Float[Array, "B T"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
  """Returns the squared error of the raw scalar, for values of any range."""
  return _weighted((z - labels) ** 2, w)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PQM(Ranged):
  """Ranks a trace's steps: right ones rise, wrong ones lie a margin below.

    -mean over right steps t, and the start where a step is wrong, of
     log exp(q_t) / (sum of exp(q) over right steps up to t and the start
                     + sum of exp(q + margin) over wrong steps)

  with q 0 at the start (Li & Li 2024, arXiv:2410.11287, equation 10). A row is
  one trace, of weight 1; a label above 1/2 is right.

  Attributes:
    margin: the paper's zeta; its runs have 4.
  """

  margin: NonNegativeFloat = 4.0

  def __call__(
    self,
    z: Float[Array, "B T"],
    labels: Float[Array, "B T"],
    w: Float[Array, "B T"],
  ) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Returns each row's loss and weight."""
    real = w > 0
    right, wrong = real & (labels > 0.5), real & (labels <= 0.5)
    # The start is a right step of value 0.
    pad = ((0, 0), (1, 0))
    q = jnp.pad(z.astype(jnp.float32), pad)
    right = jnp.pad(right, pad, constant_values=True)
    rising = jax.lax.cumlogsumexp(jnp.where(right, q, NEVER), axis=1)
    low = jnp.where(wrong, z + self.margin, NEVER)
    below = jax.nn.logsumexp(low, axis=1, keepdims=True)
    terms = jnp.logaddexp(rising, below) - q
    # Without a wrong step the start has nothing to be above of.
    counted = right.at[:, 0].set(wrong.any(1))
    total = jnp.where(counted, terms, 0.0).sum(1)
    some = real.any(1).astype(jnp.float32)
    return some * total / jnp.maximum(counted.sum(1), 1), some


def every_step(
  labels: Float[Array, "B T"],
  w: Float[Array, "B T"],
  segments: Int[Array, "B T"],
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """Returns labels and weights as they are: a process reward model."""
  del segments
  return labels, w


def last_step(
  labels: Float[Array, "B T"],
  w: Float[Array, "B T"],
  segments: Int[Array, "B T"],
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """Returns weights at each trace's last label alone: an outcome reward model.

  The same as TRL's `train_on_last_step_only`.
  """
  after, exists = _next(jnp.pad(w[:, 1:] > 0, ((0, 0), (0, 1))), 1)
  same = jnp.take_along_axis(segments, after, axis=1) == segments
  return labels, jnp.where(exists & same, 0.0, w)


def outcome_everywhere(
  labels: Float[Array, "B T"],
  w: Float[Array, "B T"],
  segments: Int[Array, "B T"],
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """Returns each trace's last label at all of its labelled tokens.

  An outcome reward model that learns from every prefix (Cobbe et al. 2021,
  arXiv:2110.14168, appendix E), an estimate of the value.
  """
  _, last = last_step(labels, w, segments)
  final, _ = _next(last > 0, 0)
  return jnp.take_along_axis(labels, final, axis=1), w


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReward:
  """The loss of a reward model over labelled steps.

  Attributes:
    model: the reward model; an experiment sets it.
    loss: loss of the steps: `soft`, a `Hard`, `squared_probability`,
      `squared_value` or a `PQM`.
    supervision: which labels are learned: `every_step`, `last_step` or
      `outcome_everywhere`.
  """

  model: RewardModel | GenerativeReward | None = None
  loss: StepLoss = soft
  supervision: Supervision = every_step

  def __call__(self, params: Params, batch: Batch, key: PRNGKey | None) -> Sums:
    """Returns sums over steps, or over traces if the loss ranks these.

    Metrics are `accuracy` (a positive log-odds for a label above 1/2),
    `score`, the mean probability, and `label`, the mean label.
    """
    params = weights.bind(params, key=key)
    labels, w = self.supervision(
      batch["labels"], batch["weights"], batch["segments"]
    )
    z = log_odds(
      self.model.logits(
        params, batch["tokens"], batch["positions"], batch["segments"], key
      )
    )
    # Whatever stands where there is no label must not reach a gradient.
    labels = jnp.where(w > 0, labels, 0.0)
    total, weight = self.loss(z, labels, w)
    metrics = {
      "accuracy": ((z > 0) == (labels > 0.5)).astype(jnp.float32),
      "score": jax.nn.sigmoid(z),
      "label": labels,
    }
    share = weight / jnp.maximum(w.sum(1), 1e-9)
    sums = {k: ((x * w).sum(1) * share).sum() for k, x in metrics.items()}
    return total.sum(), weight.sum(), sums


def _weighted(
  terms: Float[Array, "B T"], w: Float[Array, "B T"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
  return jnp.where(w > 0, terms * w, 0.0).sum(1), w.sum(1)


def _next(marked: Array, offset: int) -> tuple[Array, Array]:
  """Returns the index of the first marked position at or after each one.

  Args:
    marked: bool [B, T].
    offset: added to the indices found.

  Returns:
    Indices, clipped to the row, and whether there is one.
  """
  length = marked.shape[1]
  at = jnp.where(marked, jnp.arange(length) + offset, length)
  nearest = jax.lax.cummin(at, axis=1, reverse=True)
  return jnp.minimum(nearest, length - 1), nearest < length
