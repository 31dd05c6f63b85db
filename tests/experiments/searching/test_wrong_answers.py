"""Kinds of wrong solutions, against counts by hand."""

import pytest

from experiments.searching.pool import Sample, Searched
from experiments.searching.wrong_answers import kind_of, kinds_of
from research.prm.scores.aggregate import Last
from research.reasoning.problem import Problem, Verdict
from research.reasoning.trace import Step, Trace
from research.search.ledger import Ledger


def sample(reason, score, vote="x"):
  step = Step(text="s ;", start=0, end=1, score=score)
  trace = Trace(
    problem_id="p", steps=(step,), final_answer=vote, finish="eos", n_new=1
  )
  return Sample(trace, Verdict(reason == "correct", "x", "x", reason))


def searched(*samples):
  problem = Problem(id="p", prompt="p")
  return Searched(problem, samples, Ledger(), Ledger())


FALSE = "wrong: 3 + 4 is 7, not 9"
LEFT = "wrong: 2 numbers left"


@pytest.mark.parametrize(
  "reason, vote, kind",
  [
    (FALSE, "x", "N is N, not N"),
    ("wrong: 12 * 3 is 36, not 40", "x", "N is N, not N"),
    ("wrong: 31", "x", "N"),
    (LEFT, "x", "N numbers left"),
    ("correct", "x", ""),
    ("anything", None, "no answer"),
  ],
)
def test_a_kind_has_no_numbers(reason, vote, kind):
  assert kind_of(sample(reason, 0.5, vote)) == kind


def test_kinds_are_compared_with_right_ones_of_the_same_problem():
  pool = [
    searched(
      sample("correct", 0.6),
      sample("correct", 0.9),
      sample(FALSE, 0.7),
      sample(FALSE, 0.6),
    ),
    searched(sample(FALSE, 0.1), sample(LEFT, 0.2)),  # no right one
  ]
  found = kinds_of(pool, Last())
  assert list(found) == ["N is N, not N", "N numbers left"]
  # Pairs: 0.6 < 0.7, 0.9 > 0.7, 0.6 = 0.6, 0.9 > 0.6.
  assert found["N is N, not N"] == {"share": 0.5, "below": 2.5 / 4}
  assert found["N numbers left"] == {"share": 1 / 6, "below": None}
