"""Labels of progress: how much a step changed the chance of success.

The value of a state mixes how good a step is with how hard the problem was
already. These compare it with the state before.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from research.errors import UserError
from research.prm.labelled import Label


def _before(
  values: Sequence[float | int], start: float | int
) -> Float[np.ndarray, "T"]:
  return np.array([start, *values[:-1]], float)


def relative_progress(
  values: Sequence[float | int],
  start: float | int,
  threshold: float | int = 0.8,
) -> tuple[Label, ...]:
  """Returns 1 where `MC(s_t) / MC(s_{t-1})` is at least a threshold.

  Zhao et al. 2025, "GenPRM" (arXiv:2504.00891), section 3.2: a good step of a
  hard problem is not called bad for the problem. After a value of 0 there is no
  progress to measure, and labels are unknown.

  Args:
    values: of the states at the end of each step.
    start: of the problem, before any step.
    threshold: epsilon; 0.8 in the paper.
  """
  labels: list[Label] = []
  before = start
  for value in values:
    # Quotients of shares may round to just below the threshold.
    least = threshold * before * (1 - 1e-9)
    labels.append(None if before == 0 else int(value >= least))
    before = value
  return tuple(labels)


def advantages(
  values: Sequence[float | int], start: float | int
) -> tuple[float, ...]:
  """Returns `A(s_t, a_t) = Q(s_t, a_t) - V(s_t)` of each step under a prover.

  Setlur et al. 2024, "Rewarding Progress" (arXiv:2410.08146), equation 2.
  Environments are deterministic here, so that Q of a step is V of the state
  after it. They add up to the last value minus the first.

  Args:
    values: the prover's, at the end of each step.
    start: the prover's of the problem.
  """
  found = np.asarray(values, float) - _before(values, start)
  return tuple(found.tolist())


def best_of_k_value(value: float | int, k: int) -> float:
  """Returns the value of a prover that is the best of k rollouts.

  `1 - (1 - V)^k`; at moderate k it tells good from bad steps where the policy
  itself rarely succeeds (Setlur et al. 2024, section 3.4).
  """
  return 1 - (1 - value) ** k


def effective_reward(
  policy_values: Sequence[float | int],
  prover_values: Sequence[float | int],
  prover_start: float | int,
  alpha: float | int,
) -> tuple[float, ...]:
  """Returns `Q^pi + alpha A^mu` of each step (Setlur et al. 2024, equation 5).

  With the policy as its own prover, the advantage adds nothing to what the
  outcome says of the policy gradient.

  Args:
    policy_values, prover_values: at the end of each step.
    prover_start: the prover's value of the problem.
    alpha: weight of the advantage.

  Raises:
    UserError: there are not as many values of both.
  """
  if len(policy_values) != len(prover_values):
    raise UserError(
      f"effective_reward: found {len(policy_values)} and {len(prover_values)}"
      " values, expected one a step of both"
    )
  gained = np.asarray(advantages(prover_values, prover_start))
  return tuple((np.asarray(policy_values, float) + alpha * gained).tolist())


def preference_pairs(
  values: Sequence[float | int], most: int = 2
) -> list[tuple[int, int]]:
  """Returns pairs (better, worse) of siblings, from best and worst ones.

  Guan et al. 2025, "rStar-Math" (arXiv:2501.04519), section 3.3: values from a
  search rank steps better than they score them. Equal values make no pair.

  Args:
    values: of sibling steps.
    most: number of best ones, and of worst ones; 2 in the paper.
  """
  order = sorted(range(len(values)), key=lambda i: -values[i])
  most = min(most, len(order) // 2)
  best, worst = order[:most], order[len(order) - most :]
  return [(i, j) for i in best for j in worst if values[i] > values[j]]
