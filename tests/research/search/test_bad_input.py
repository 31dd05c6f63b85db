"""Searches over what goes wrong: exact behaviour, nothing silent."""

import dataclasses
import functools
import time

import jax
import numpy as np
import pytest

from research.generation.sampling import Sampling
from research.prm.scores.aggregate import Last, Product
from research.search.choose import BestOf, Majority, Weighted, answers_of
from research.search.engine import Engine
from research.search.step_search import Limits
from research.search.strategies.adaptive import Adaptive
from research.search.strategies.beam import Beam
from research.search.strategies.diverse_trees import DiverseTrees
from research.search.strategies.independent import Independent
from research.search.strategies.rebase import Rebase
from research.search.strategies.tree import TreeSearch
from research.typing import UserError
from tests.research.search import test_search as shared
from tests.research.search.test_search import Arbitrary, found, tokens

SEARCHES = {
  "beam": functools.partial(Beam, width=2),
  "trees": functools.partial(DiverseTrees, width=2),
  "rebase": Rebase,
}


# Candidates ------------------------------------------------------------------


@pytest.mark.parametrize(
  "search",
  [
    Independent(copies=1),
    Beam(copies=1, width=1),
    DiverseTrees(copies=1, width=1),
    Rebase(copies=1),
    TreeSearch(simulations=9, width=1),
    Adaptive(answer=lambda path: 1, round=1, max_samples=1),
  ],
  ids=lambda x: type(x).__name__,
)
def test_one_candidate_is_a_sample(search):
  """The same one whatever the search: there is nothing to choose."""
  engine = Engine(policy=shared.policy(log_probs=True), verifier=Arbitrary())
  expected = tokens(found(Independent(copies=1), engine))
  limits = Limits(tokens=shared.NEW, key=jax.random.key(2))
  if isinstance(search, Adaptive):  # each round has a key of its own
    limits = dataclasses.replace(limits, key=jax.random.key(2))
    samples = search(engine, shared.PROMPTS, limits)
    assert [len(one.paths) for one in samples] == [1] * 3
    return
  samples = search(engine, shared.PROMPTS, limits)
  assert tokens(samples) == expected
  for one in samples:
    (path,) = one.paths
    answers = answers_of([path], lambda x: x.tokens)
    for rule in (BestOf(Last()), Majority(), Weighted(Product())):
      chances = rule([path], answers)
      assert chances == ({path.tokens: 1.0} if path.stopped else {})


@pytest.mark.parametrize("name", SEARCHES)
def test_equal_scores_prune_by_place_and_choose_by_chance(name):
  """A verifier that says the same of all: no path is worth more."""
  engine = Engine(
    policy=shared.policy(), verifier=Arbitrary(value=lambda tokens: 0.5)
  )
  for one in found(SEARCHES[name](copies=4), engine):
    assert len({path.tokens for path in one.paths}) == len(one.paths)
    answers = [path.tokens for path in one.paths]
    chances = BestOf(Last())(one.paths, answers)
    # Not the first that ended, nor the shortest.
    assert set(chances.values()) == {1 / len(one.paths)}
    if name == "rebase":
      assert {path.root for path in one.paths} == set(range(4))


def test_greedy_candidates_are_equal_and_are_one_answer():
  """Without a temperature every copy is the same text: one vote in four."""
  cold = Sampling(temperature=1e-6)
  policy = dataclasses.replace(shared.policy(), sampling=cold)
  engine = Engine(policy=policy, verifier=Arbitrary())
  for one in found(Beam(copies=4, width=2), engine):
    answers = [path.tokens for path in one.paths]
    assert len(set(answers)) == 1
    for rule in (BestOf(Last()), Majority(), Weighted(Last())):
      assert rule(one.paths, answers) == {answers[0]: 1.0}


# Paths -----------------------------------------------------------------------


def test_no_answer_is_chosen_where_none_was_extracted():
  """Cut paths have none, nor have those from which nothing is extracted."""
  for one in found(Beam(copies=4, width=2), steps=1):
    cut = [path for path in one.paths if not path.stopped]
    assert cut and answers_of(cut, lambda x: x.tokens) == [None] * len(cut)
    for rule in (BestOf(Last()), Majority(), Weighted(Last())):
      assert rule(one.paths, [None] * len(one.paths)) == {}


@functools.cache
def separators():
  """Returns a policy whose every token ends a step, as "\\n\\n\\n\\n" does."""
  policy = shared.policy()
  every = np.ones_like(policy.boundary.ends)
  boundary = dataclasses.replace(policy.boundary, ends=every)
  return dataclasses.replace(policy, boundary=boundary)


def test_steps_of_separators_alone_have_a_score_each():
  """Never one score more than steps, nor an empty step at the end."""
  engine = Engine(policy=separators(), verifier=Arbitrary())
  for one in found(Independent(copies=4), engine):
    for path in one.paths:
      *steps, last = path.steps
      assert {len(step) for step in steps} <= {1}
      # A stop token alone joins the step before it.
      assert len(last) == 1 + (path.stopped and len(path.tokens) > 1)
      assert len(path.scores) == len(path.steps)
  plain = found(Independent(copies=4), Engine(policy=shared.policy()))
  cut = found(Independent(copies=4), Engine(policy=separators()))
  assert tokens(plain) == tokens(cut)


# Verifiers -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Faulty(Arbitrary):
  """Does something else than to score."""

  fault: object = None

  def read(self, state, paths, new):
    return state, self.fault(paths)


def hang(paths):
  time.sleep(30)


def raises(paths):
  raise ZeroDivisionError("of the verifier")


@pytest.mark.parametrize(
  ("fault", "error", "message"),
  [
    (lambda x: np.full(len(x), np.nan), UserError, "found the score nan"),
    (lambda x: np.full(len(x), np.inf), UserError, "found the score inf"),
    (lambda x: np.zeros(len(x) - 1), UserError, r"shape \(11,\)"),
    (lambda x: np.zeros((len(x), 1)), UserError, r"shape \(12, 1\)"),
    (hang, UserError, "no scores after 0.05 s"),
    (raises, ZeroDivisionError, "of the verifier"),
  ],
  ids=["nan", "inf", "few", "shape", "hangs", "raises"],
)
def test_a_verifier_that_does_not_score_stops_the_search(fault, error, message):
  engine = Engine(
    policy=shared.policy(),
    verifier=Faulty(fault=fault),
    timeout=0.05 if fault is hang else 30,
  )
  began = time.monotonic()
  with pytest.raises(error, match=message):
    found(Beam(copies=4, width=2), engine)
  assert time.monotonic() - began < 25


def test_a_verifier_in_time_is_one_without_a_limit():
  engine = Engine(policy=shared.policy(), verifier=Arbitrary(), timeout=30)
  assert tokens(found(Beam(copies=4, width=2), engine)) == tokens(shared.beam())
