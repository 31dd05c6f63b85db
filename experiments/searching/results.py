"""What a pool of samples says: accuracy, cost, what other budgets reach."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.searching.pool import Searched
from research.prm.scores.aggregate import AGGREGATES, Aggregate
from research.search import choose
from research.search.choose import BestOf, Choice, Confident, Majority, Weighted
from research.search.estimators import pool as estimators
from research.search.estimators.intervals import mean_accuracy
from research.search.estimators.subsets import mean_over_subsets
from research.search.estimators.voting import majority_at_k, shares_correct
from research.search.ledger import Ledger
from research.search.strategies.independent import Independent
from research.typing import UserError

LOWEST = float(np.finfo(float).min)
"""Above the score of no answer."""

RESAMPLES = 1_000
"""Of the intervals of estimates; the accuracy's own has the default."""


def accuracy_of(searched: Searched, choice: Choice) -> float:
  """Returns the chance that the answer that is chosen is right.

  Args:
    searched: a problem; one without any answer is wrong.
  """
  return _chosen(searched, choice, range(len(searched.samples)))


def _chosen(searched: Searched, choice: Choice, which: Sequence[int]) -> float:
  samples = [searched.samples[i] for i in which]
  paths, answers = [x.path() for x in samples], [x.answer for x in samples]
  correct = [x.correct for x in samples]
  if isinstance(_innermost(choice), BestOf):
    # One sample is chosen, whose own verdict counts, as in `best_at`.
    pairs = zip(answers, correct, strict=True)
    keys = [None if answer is None else (answer, x) for answer, x in pairs]
    return choose.accuracy(choice(paths, keys), lambda key: key[1])
  right = shares_correct(answers, correct)
  return choose.accuracy(choice(paths, answers), right.__getitem__)


def accuracy_at(searched: Searched, choice: Choice, n: int) -> float:
  """Returns the mean over all subsets of n independent samples.

  Votes and best-of-n by their closed forms, others by subsets, which are drawn
  where they are many.
  """
  samples = searched.samples
  answers = [x.answer for x in samples]
  correct = [x.correct for x in samples]
  if n == len(samples):
    return accuracy_of(searched, choice)
  if isinstance(choice, Majority):
    return majority_at_k(answers, correct, n)
  if isinstance(choice, BestOf):
    return best_at(searched, choice.aggregate, [n])[0]
  return mean_over_subsets(
    lambda which: _chosen(searched, choice, which), len(samples), n
  ).value


def best_at(
  searched: Searched, aggregate: Aggregate, budgets: Sequence[int]
) -> list[float]:
  """Returns best-of-n of independent samples for each budget n.

  Args:
    searched: a problem; a sample without an answer is never the best.
  """
  scores = np.array(
    [
      -np.inf if x.answer is None else max(aggregate(x.scores), LOWEST)
      for x in searched.samples
    ]
  )
  correct = np.array([x.correct for x in searched.samples])
  return [estimators.best_of_k(scores, correct, n) for n in budgets]


def result_of(
  pool: Sequence[Searched], strategy: Any, choice: Choice, n: int | None
) -> dict[str, Any]:
  """Returns the accuracy of a pool, its interval and its cost.

  `answered` is the share of all samples in which an answer was found.

  Raises:
    UserError: the choice needs scores, or n subsets, that the pool cannot give.
  """
  check_choice(pool, strategy, choice, n)
  each = accuracies(pool, choice, n)
  costs = [cost_at(searched, n) for searched in pool]
  accuracy = mean_accuracy(each)
  samples = [x for searched in pool for x in searched.samples]
  return {
    "n": _number(n or _budget(pool, strategy)),
    "problems": len(pool),
    "accuracy": accuracy.value,
    "interval": [accuracy.low, accuracy.high],
    "answered": sum(x.answer is not None for x in samples) / len(samples),
    "flops_per_problem": _mean(costs, "flops"),
    "flops_policy": _mean(costs, "flops_policy"),
    "flops_verifier": _mean(costs, "flops_verifier"),
    "tokens_per_problem": _mean(costs, "policy_decode_tokens"),
    "seconds": sum(x["seconds"] for x in costs),
  }


def accuracies(
  pool: Sequence[Searched], choice: Choice, n: int | None
) -> list[float]:
  """Returns each problem's chance of a right answer."""
  if n is None:
    return [accuracy_of(searched, choice) for searched in pool]
  return [accuracy_at(searched, choice, n) for searched in pool]


def check_choice(
  pool: Sequence[Searched], strategy: Any, choice: Choice, n: int | None
) -> None:
  """Raises UserError for a choice that a pool does not support."""
  inner = _innermost(choice)
  paths = [x for searched in pool for x in searched.samples if x.trace.steps]
  if isinstance(inner, BestOf | Weighted) and not all(x.scores for x in paths):
    raise UserError(
      f"SearchRun.choice: found {type(inner).__name__}, and samples without"
      " scores; choose by choose.Majority, or sample with a verifier."
    )
  if n is None:
    return
  if not isinstance(strategy, Independent):
    raise UserError(
      f"SearchRun.n: found {n} of the samples of {type(strategy).__name__},"
      " whose samples depend on each other, expected None: search again with a"
      " smaller budget.\nSubsets are as good as fewer samples for Independent."
    )
  least = min(len(searched.samples) for searched in pool)
  if n > least:
    raise UserError(
      f"SearchRun.n: found {n}, but a problem has {least} samples; sample more."
    )


def _innermost(choice: Choice) -> Choice:
  """Returns what chooses among the paths that are left."""
  while isinstance(choice, Confident):
    choice = choice.inner
  return choice


def cost_at(searched: Searched, n: int | None) -> dict[str, float]:
  """Returns what n of a problem's independent samples cost in the mean.

  Args:
    searched: the problem; its prompt is read once, however many there are.
    n: number of samples; None for all that was computed.

  Returns:
    Its ledger's fields, of means, and `flops` of policy and verifier.
  """
  share = 1.0 if n is None else n / len(searched.samples)
  costs = {}
  for field in dataclasses.fields(Ledger):
    total = getattr(searched.ledger, field.name)
    prompt = getattr(searched.prompt_ledger, field.name)
    costs[field.name] = prompt + share * (total - prompt)
  return costs | {"flops": costs["flops_policy"] + costs["flops_verifier"]}


def estimates_of(
  pool: Sequence[Searched], strategy: Any
) -> dict[str, Any] | None:
  """Returns what each budget of independent samples would reach.

  pass@k, maj@k, and best-of-k by each aggregate if there are scores, unbiased
  (`search.estimators`), with intervals over problems; and the mean FLOPs.

  Args:
    strategy: that searched them; None is returned for any but `Independent`,
      of which no subset is a smaller search.
  """
  if not isinstance(strategy, Independent):
    return None
  most = min(len(searched.samples) for searched in pool)
  scored = all(x.scores for o in pool for x in o.samples if x.trace.steps)
  estimates: dict[str, Any] = {"k": (budgets := _budgets(most))}
  rules: dict[str, Any] = {"pass": _pass_at, "majority": _majority_at}
  if scored:
    rules |= {
      f"best_of/{name}": functools.partial(best_at, aggregate=aggregate)
      for name, aggregate in AGGREGATES.items()
    }
  for name, rule in rules.items():
    each = np.array([rule(searched, budgets=budgets) for searched in pool])
    rows = [mean_accuracy(column, RESAMPLES) for column in each.T]
    estimates[name] = [[x.value, x.low, x.high] for x in rows]
  estimates["flops"] = [
    _mean([cost_at(searched, k) for searched in pool], "flops") for k in budgets
  ]
  return estimates


def _pass_at(searched: Searched, budgets: Sequence[int]) -> list[float]:
  correct = [x.correct for x in searched.samples]
  return [estimators.pass_at_k(len(correct), sum(correct), k) for k in budgets]


def _majority_at(searched: Searched, budgets: Sequence[int]) -> list[float]:
  return [accuracy_at(searched, Majority(), k) for k in budgets]


def _budgets(most: int) -> list[int]:
  """Returns powers of two, and the most there is."""
  powers = [1 << i for i in range(most.bit_length()) if 1 << i <= most]
  return powers if powers[-1] == most else [*powers, most]


def _mean(costs: Sequence[dict[str, float]], name: str) -> float:
  return float(np.mean([x[name] for x in costs]))


def _budget(pool: Sequence[Searched], strategy: Any) -> float | int:
  """Returns a strategy's paths of a problem, or the mean number of samples."""
  copies = getattr(strategy, "copies", None)
  return copies or float(np.mean([len(searched.samples) for searched in pool]))


def _number(x: Any) -> int | float:
  return int(x) if float(x).is_integer() else float(x)
