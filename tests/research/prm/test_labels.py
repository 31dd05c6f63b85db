"""Derived labels against a small world in which everything can be enumerated.

A solution is four choices of "a" or "b"; which of the 16 are correct is a set.
A completer that returns every completion equally often has exact values.
"""

import dataclasses
import itertools
import math

import pytest

from research.errors import UserError
from research.prm import labels
from research.prm.labelled import LabelledSolution
from research.prm.labels.binary_search import locate_with_rollouts
from research.prm.labels.omegaprm import OmegaPRM
from research.prm.labels.rollouts import Rollout
from research.reasoning.trace import MonteCarlo

DEPTH, K = 4, 16
ALL = list(itertools.product("ab", repeat=DEPTH))
WORLDS = [
  {("a",) * 4},
  {x for x in ALL if x[:2] == ("a", "b")},
  {x for x in ALL if x.count("b") >= 3},
]


def _completer(correct):
  calls = []

  def complete(prefixes, k):
    calls.append(list(prefixes))
    found = []
    for prefix in prefixes:
      rest = list(itertools.product("ab", repeat=DEPTH - len(prefix)))
      assert k % len(rest) == 0
      found.append(
        [Rollout(x, prefix + x in correct) for x in rest] * (k // len(rest))
      )
    return found

  complete.calls = calls
  return complete


def _value(prefix, correct):
  ends = [x for x in ALL if x[: len(prefix)] == prefix]
  return sum(x in correct for x in ends) / len(ends)


def _first_hopeless(steps, correct):
  return next(i for i in range(DEPTH) if _value(steps[: i + 1], correct) == 0)


@pytest.mark.parametrize("correct", WORLDS, ids=len)
def test_monte_carlo_counts_are_exact_values(correct):
  complete = _completer(correct)
  for steps in ALL:
    counts = labels.monte_carlo(steps, steps in correct, complete, K)
    exact = [_value(steps[:n], correct) for n in range(1, DEPTH + 1)]
    assert [x.value for x in counts] == exact
    assert labels.soft(counts) == tuple(exact)
    assert labels.hard(counts) == tuple(int(x > 0) for x in exact)
    assert counts[-1].rollouts == 1  # the verdict needs no rollout
  assert {len(prefixes) for prefixes in complete.calls} == {DEPTH - 1}


@pytest.mark.parametrize("correct", WORLDS, ids=len)
def test_binary_search_finds_what_labelling_all_steps_finds(correct):
  wrong = [x for x in ALL if x not in correct]
  complete = _completer(correct)
  found = labels.locate_errors(wrong, complete, K)
  for steps, located in zip(wrong, found, strict=True):
    assert located.first_error == _first_hopeless(steps, correct)
    assert len(located.probes) <= math.ceil(math.log2(DEPTH))
    for at, counts in located.probes.items():
      assert counts.value == _value(steps[: at + 1], correct)
    counts = labels.monte_carlo(steps, False, complete, K)
    assert located.labels(DEPTH) == labels.truncate(labels.hard(counts))
  # All solutions in lockstep: a batch a round.
  rounds = complete.calls[: math.ceil(math.log2(DEPTH))]
  assert len(rounds[0]) == len(wrong)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 33])
def test_binary_search_takes_a_logarithm_of_probes(n):
  steps = tuple(map(str, range(n)))
  for error in range(n):

    def complete(prefixes, k, error=error):
      return [[Rollout(("x",), len(x) <= error)] * k for x in prefixes]

    (located,) = labels.locate_errors([steps], complete, 2)
    assert located.first_error == error
    assert len(located.probes) <= math.ceil(math.log2(n))


def _probes(taken, correct):
  """Returns how many states a selection's binary search probes."""

  def complete(prefixes, k):
    return _completer(correct)([taken.steps + x for x in prefixes], k)

  (located,) = labels.locate_errors([taken.rollout], complete, K)
  return len(located.probes)


@pytest.mark.parametrize("correct", WORLDS, ids=len)
def test_omegaprm_has_exact_values_and_selects_the_best_pair(correct):
  settings = OmegaPRM(k=K, scale=4.0)
  tree = settings.search(_completer(correct))
  assert tree.selections
  for state in tree.states:
    assert state.counts.value == _value(state.steps, correct)
  probes = 0
  for i, taken in enumerate(tree.selections):
    whole = taken.steps + taken.rollout
    assert taken.first_error == _first_hopeless(whole, correct)
    probes += _probes(taken, correct)
    if i > 5:
      continue
    before = dataclasses.replace(settings, selections=i)
    states = before.search(_completer(correct)).states
    total = sum(s.visits for s in states)
    assert total == i
    best = max(
      0.5 ** (1 - _value(s.steps, correct)) * 0.9 ** (len(r) / 4)
      + 0.125 * math.sqrt(total) / (1 + s.visits)
      for s in states
      for r in s.wrong
      if 0 < _value(s.steps, correct) < 1
    )
    (chosen,) = (s for s in states if s.steps == taken.steps)
    assert taken.rollout in chosen.wrong
    assert settings.score(chosen, taken.rollout, total) == pytest.approx(best)
  assert tree.used == K * (1 + probes)
  # Nothing is left, and nothing was taken twice.
  assert not any(s.wrong for s in tree.states if s.selectable)
  assert len(set(tree.selections)) == len(tree.selections)


def test_omegaprm_stops_at_its_budget_and_where_there_is_nothing_to_find():
  correct = WORLDS[2]
  few = OmegaPRM(k=K, rollouts=3 * K).search(_completer(correct))
  assert 3 * K <= few.used <= 3 * K + 2 * K
  for hopeless in (set(), set(ALL)):
    tree = OmegaPRM(k=K).search(_completer(hopeless))
    assert (len(tree.states), len(tree.selections)) == (1, 0)


def test_a_trees_solutions_have_counts_where_states_were_probed():
  tree = OmegaPRM(k=K).search(_completer(WORLDS[1]))
  by_steps = {state.steps: state.counts for state in tree.states}
  solutions = tree.solutions("choose")
  ends = {x.steps for x in solutions}
  assert all(
    any(steps == end[: len(steps)] for end in ends) for steps in by_steps
  )
  for solution in solutions:
    for n, counts in enumerate(solution.mc, start=1):
      assert counts == by_steps.get(solution.steps[:n])
      label = solution.labels[n - 1]
      assert label == (counts and counts.value)


@pytest.mark.parametrize("correct", WORLDS, ids=len)
def test_exact_oracles_are_the_enumeration(correct):
  def children(x):
    return [x + (c,) for c in "ab"] if len(x) < DEPTH else []

  def policy(x):
    return [labels.Transition(child, 0.5) for child in children(x)]

  for n in range(DEPTH + 1):
    for prefix in itertools.product("ab", repeat=n):
      value = labels.state_value(prefix, policy, correct.__contains__)
      assert value == pytest.approx(_value(prefix, correct))
      solvable = labels.is_solvable(prefix, children, correct.__contains__)
      assert solvable == (_value(prefix, correct) > 0)


def test_a_checkers_labels_end_at_the_first_error():
  verdicts = {"good": "ok", "bad": "error", "odd": "unknown"}

  def verify(prefix, step):
    assert "bad" not in prefix
    return verdicts[step]

  steps = ("good", "odd", "bad", "good")
  assert labels.label_steps(steps, verify) == (1, None, 0, None)


def test_truncation_makes_what_follows_an_error_unknown():
  assert labels.truncate((1, 0, 1, 0)) == (1, 0, None, None)
  assert labels.truncate((0.5, 1)) == (0.5, 1)
  assert labels.hard([MonteCarlo(1, 8), None], threshold=1 / 8) == (0, None)


def test_hard_labels_are_biased_both_ways():
  """Section 5.2 of the specification: p = 0.3 and 0.05, 8 and 16 rollouts."""
  assert labels.chance_of_positive(0.3, 8) == pytest.approx(0.94, abs=5e-3)
  assert labels.chance_of_positive(0.05, 8) == pytest.approx(0.34, abs=5e-3)
  assert labels.chance_of_positive(0.05, 16) == pytest.approx(0.56, abs=5e-3)


def _labelled(*rows):
  return [
    LabelledSolution(prompt=str(i), steps=("a", "b", "c"), labels=row)
    for i, row in enumerate(rows)
  ]


def test_consensus_keeps_equal_first_errors():
  first = _labelled((1, 0, 0), (1, 1, 1), (1, 1, 1), (1, 0, 1), (None, 0, 0))
  second = _labelled(
    (1, 0, None), (1, 1, 1), (1, 1, 0), (0, None, None), (None, 0, 0)
  )
  found = labels.consensus(first, second)
  assert [x.prompt for x in found.kept] == ["0", "1"]
  assert found.kept[0].labels == (1, 0, None)
  assert found.rate == 2 / 5
  with pytest.raises(UserError, match="different texts in solution 0"):
    labels.consensus(first[:2], second[1::-1])


def test_a_completer_that_lies_about_its_number_is_refused():
  def complete(prefixes, k):
    return [[Rollout(("x",), True)] * (k - 1) for _ in prefixes]

  with pytest.raises(UserError, match=r"found \[1\] rollouts, expected 2"):
    labels.monte_carlo(("a", "b"), True, complete, 2)
  with pytest.raises(UserError, match="k = 0"):
    labels.monte_carlo(("a", "b"), True, complete, 0)
  with pytest.raises(UserError, match="without steps"):
    locate_with_rollouts([()], complete, 2)
