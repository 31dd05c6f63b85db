"""Choices by scores with independent errors, against enumerations."""

import itertools

import numpy as np
import pytest
from scipy import integrate, stats

from experiments.searching.pool import Sample, Searched
from experiments.searching.wrong_answers import errors_of
from research.prm.scores.aggregate import Last
from research.reasoning.problem import Problem, Verdict
from research.reasoning.trace import Step, Trace
from research.search.estimators.score_errors import (
  IndependentErrors,
  best_of_binormal,
)
from research.search.ledger import Ledger


def enumerated(right, wrong, n_right, n_wrong):
  """Returns the mean over all draws; a random one of equal scores is taken."""
  shares = []
  for a in itertools.product(right, repeat=n_right):
    for b in itertools.product(wrong, repeat=n_wrong):
      best = max(*a, *b)
      shares.append(a.count(best) / (a.count(best) + b.count(best)))
  return np.mean(shares)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_right, n_wrong", [(1, 1), (2, 3), (3, 1)])
def test_independent_errors_equal_the_mean_over_all_draws(
  n_right, n_wrong, seed
):
  rng = np.random.default_rng(seed)
  right, wrong = rng.integers(1, 5, 4) / 4, rng.integers(0, 4, 5) / 4
  chance = IndependentErrors(right, wrong).best_of(n_right, n_wrong)
  expected = enumerated(right, wrong, n_right, n_wrong)
  assert chance == pytest.approx(expected, abs=1e-12)


def test_without_right_or_wrong_samples_no_score_is_needed():
  errors = IndependentErrors(np.array([0.1]), np.array([0.9]))
  assert errors.best_of(0, 3) == errors.best_of(0, 0) == 0
  assert errors.best_of(3, 0) == 1 and errors.best_of(15, 1) == 0


@pytest.mark.parametrize("auc", [0.3, 0.5, 0.85, 1.0])
def test_normal_scores_have_their_auc_and_their_maximum(auc):
  assert best_of_binormal(auc, 1, 1) == pytest.approx(auc, abs=1e-6)
  if 0 < auc < 1:
    right = stats.norm(np.sqrt(2) * stats.norm.ppf(auc))
    expected, _ = integrate.quad(
      lambda x: 2 * right.pdf(x) * right.cdf(x) * stats.norm.cdf(x) ** 5,
      *(-10, 10),
    )
    assert best_of_binormal(auc, 2, 5) == pytest.approx(expected, abs=1e-6)


def sample(text, score, vote):
  step = Step(text=text, start=0, end=1, score=score)
  trace = Trace(
    problem_id="p", steps=(step,), final_answer=vote, finish="eos", n_new=1
  )
  return Sample(trace, Verdict(vote == "3", vote, vote, ""))


def searched(*samples):
  """Returns a problem with samples of a text, a score and a vote each."""
  solutions = tuple(sample(*x) for x in samples)
  problem = Problem(id="p", prompt="p")
  return Searched(problem, solutions, Ledger(), Ledger())


def test_equal_solutions_count_once_and_those_without_an_answer_do_not():
  same = ("a", 0.5, "3")
  pool = [
    searched(same, same, ("b", 0.25, "4"), ("c", 1.0, None)),
    searched(("d", 0.5, "4"), ("d", 0.5, "4")),
  ]
  errors = errors_of(pool, Last())
  assert errors["distinct"] == 1.5 and errors["perfect"] == 0.5
  # One right score of 0.5; wrong ones are 0.25 of its problem, and 0.5.
  assert errors["auc_within"] == 1 and errors["auc"] == 0.75
  assert errors["independent"] == pytest.approx(0.75 / 2)


def test_scores_that_do_not_err_choose_as_well_as_a_perfect_verifier():
  rng = np.random.default_rng(0)
  pool = [
    searched(
      *(
        (f"{i} {j}", 0.25 + 0.5 * right, "3" if right else "4")
        for j, right in enumerate(rng.integers(0, 2, 4))
      )
    )
    for i in range(8)
  ]
  errors = errors_of(pool, Last())
  assert errors["independent"] == errors["perfect"] < 1 == errors["auc"]
