"""Tree search: what it visits, against a tree that is walked by hand."""

import dataclasses
import math

import jax
import pytest

from research.prm.scores.aggregate import Last
from research.search.engine import Engine
from research.search.step_search import Limits
from research.search.strategies.tree import TreeSearch
from research.typing import UserError
from tests.research.search import test_search as shared


def run(tree, **fields):
  policy = shared.policy(log_probs=True)
  engine = Engine(policy=policy, verifier=shared.Arbitrary())
  limits = Limits(tokens=shared.NEW, key=jax.random.key(2), **fields)
  return tree(engine, shared.PROMPTS, limits)


class Noted(TreeSearch):
  """Keeps every line of nodes that a simulation goes down."""

  def _descend(self, root):
    line = super()._descend(root)
    lines.append((root, line))
    return line


lines = []


@pytest.mark.slow
def test_simulations_go_where_the_bound_is_highest():
  lines.clear()
  tree = Noted(simulations=5, width=2)
  samples = run(tree)
  assert len(lines) == 5 * len(shared.PROMPTS)
  for root, _ in lines:
    nodes = list(root.walk())
    # Every step's score is counted by itself and by all above it.
    for node in nodes:
      if node.children:
        assert node.visits >= sum(x.visits for x in node.children)
        assert sum(x.prior for x in node.children) == pytest.approx(1)
    texts = [node.path.tokens for node in nodes if node.path]
    assert len(set(texts)) == len(texts)
    for node in nodes:
      for child in node.children:
        before = node.path.tokens if node.path else ()
        assert child.path.tokens[: len(before)] == before
        read = len(child.path.tokens) - shared.unread(child.path)
        text = child.path.tokens[:read]
        assert child.path.scores[-1] == shared.score(text)
  for one in samples:
    assert one.paths


def test_the_first_simulation_by_hand():
  """Two children with their scores as values: the formula chooses."""
  lines.clear()
  run(Noted(simulations=1, width=2))
  for root, line in lines:
    first = root.children
    growth = math.log((2 + 19_652 + 1) / 19_652) + 1.25
    bounds = [
      node.path.scores[0] + node.prior * growth * math.sqrt(2) / 2
      for node in first
    ]
    assert line == [root, first[bounds.index(max(bounds))]]


@pytest.mark.slow
def test_a_tree_of_one_path_is_a_path():
  """Width 1: each simulation adds the next step, or visits the end again."""
  samples = run(TreeSearch(simulations=4, width=1))
  expected = shared.found(shared.Independent(copies=1))
  for one, other in zip(samples, expected, strict=True):
    assert [x.tokens for x in one.paths] == [x.tokens for x in other.paths]
    for name in ("flops_policy", "policy_decode_tokens"):
      assert getattr(one.ledger, name) == getattr(other.ledger, name)


def test_a_tree_without_an_end_has_its_best_path():
  for one in run(TreeSearch(simulations=1, width=2), steps=2):
    assert one.paths
    if not one.paths[0].done:
      assert len(one.paths) == 1


def test_the_peak_is_what_is_in_the_cache():
  """Rows for all nodes from the first on, and those that grow; each whole."""
  engine = Engine(
    policy=dataclasses.replace(shared.policy(log_probs=True), stop_tokens=()),
    verifier=shared.Arbitrary(),
  )
  limits = Limits(tokens=shared.NEW, key=jax.random.key(2))
  tree = TreeSearch(simulations=1, width=2)
  samples = tree(engine, shared.PROMPTS, limits)
  for prompt, one in zip(shared.PROMPTS, samples, strict=True):
    step = len(prompt) + shared.STEP
    assert one.ledger.peak_cache_tokens == 4 * step + 2 * (step + shared.STEP)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda: TreeSearch(prune=Last())(
        Engine(policy=shared.policy()), [[1]], Limits(tokens=2)
      ),
      "found no verifier",
    ),
    (
      lambda: TreeSearch(width=2)(
        Engine(policy=shared.policy(), verifier=shared.Arbitrary()),
        *(shared.PROMPTS, Limits(tokens=2)),
      ),
      "paths without log-probabilities",
    ),
  ],
)
def test_mistakes(make, message):
  with pytest.raises(UserError, match=message):
    make()
