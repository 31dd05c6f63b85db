"""Searches with known chances, against closed forms and enumeration.

Section 16 of what is known of them. The strategies' own rules choose; paths are
made by hand, so no model is needed.
"""

import functools
import itertools
import math

import numpy as np
import pytest

from research.prm.scores.aggregate import Last
from research.search import estimators
from research.search.choose import BestOf
from research.search.engine import Path
from research.search.strategies.beam import Beam

# Chains of steps -------------------------------------------------------------

STEPS, P = 8, 0.85


def kept_right(n, t, f):
  """Returns the chance that a beam of one keeps a right step, of n children.

  Over all cases of right and wrong steps, and of what the verifier says.
  """
  beam, total = Beam(copies=n, width=n), 0.0
  for good in itertools.product((False, True), repeat=n):
    for said in itertools.product((False, True), repeat=n):
      chance = math.prod(
        (P if g else 1 - P) * abs((t if g else f) - (not s))
        for g, s in zip(good, said, strict=True)
      )
      paths = [
        Path(0, i, 1, steps=((i,),), scores=(float(s),))
        for i, s in enumerate(said)
      ]
      total += chance * good[np.argmax(beam.children(paths))]
  return total


@pytest.mark.parametrize(
  ("n", "t", "f", "expected"),
  [(1, 1, 0, 0.2725), (4, 1, 0, 0.9960), (4, 0.95, 0.05, 0.9220)],
)
def test_steps_that_are_chosen_are_right_as_often_as_the_formula(
  n, t, f, expected
):
  """A wrong step is final: eight of them are right, or the answer is not."""
  found = kept_right(n, t, f)
  assert found**STEPS == pytest.approx(expected, abs=5e-5)
  assert found == pytest.approx(estimators.noisy_best_of_n(P, t, f, n))


def test_a_better_model_needs_fewer_samples_a_step():
  """One pass of p = .95 is .6634: less than four samples a step of .85."""
  alone = estimators.noisy_best_of_n(0.95, 1, 0, 1) ** STEPS
  assert alone == pytest.approx(0.6634, abs=5e-5)
  assert alone == pytest.approx(0.95**8)
  assert alone < estimators.noisy_best_of_n(P, 0.95, 0.05, 4) ** STEPS


# Exact values ----------------------------------------------------------------

DEPTH, BRANCHES = 3, 2


class Tree:
  """Texts of a few tokens, their chances, and which of them are right."""

  def __init__(self, seed):
    rng = np.random.default_rng(seed)
    texts = list(itertools.product(range(BRANCHES), repeat=DEPTH))
    self.right = dict(zip(texts, rng.random(len(texts)) < 0.4, strict=True))
    self.chances = {
      text: rng.dirichlet(np.ones(BRANCHES))
      for n in range(DEPTH)
      for text in itertools.product(range(BRANCHES), repeat=n)
    }

  def value(self, text):
    """Returns the policy's chance to end right from here."""
    if len(text) == DEPTH:
      return float(self.right[text])
    parts = zip(range(BRANCHES), self.chances[text], strict=True)
    return sum(p * self.value((*text, x)) for x, p in parts)

  def solvable(self, text):
    """Returns 1 if some text from here is right, else 0."""
    return float(self.value(text) > 0)

  def accuracy(self, beam, score):
    """Returns the chance of a right answer, over all that may be drawn."""
    choice = BestOf(Last())

    @functools.cache
    def ahead(texts):
      total = 0.0
      for drawn in itertools.product(range(BRANCHES), repeat=len(texts)):
        pairs = list(zip(texts, drawn, strict=True))
        chance = math.prod(self.chances[text][x] for text, x in pairs)
        new = [(*text, x) for text, x in pairs]
        paths = [
          Path(0, i, 1, steps=tuple((x,) for x in text),
               scores=tuple(score(text[: k + 1]) for k in range(len(text))))
          for i, text in enumerate(new)
        ]  # fmt: skip
        if len(new[0]) == DEPTH:
          picked = choice(paths, new)
          total += chance * sum(p * self.right[x] for x, p in picked.items())
          continue
        counts = beam.children(paths)
        kept = zip(new, counts, strict=True)
        total += chance * ahead(tuple(x for x, n in kept for _ in range(n)))
      return total

    return ahead(((),) * beam.copies)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["value", "solvable"])
def test_exact_values_make_a_beam_better_with_every_path(seed, name):
  """From pass@1 up to what the tree has at all."""
  tree = Tree(seed)
  score = getattr(tree, name)
  beams = [Beam(copies=n, width=n) for n in (1, 2, 3, 4)]
  found = [tree.accuracy(beam, score) for beam in beams]
  assert found[0] == pytest.approx(tree.value(()))
  assert (np.diff(found) > 0).all() and found[-1] < 1
  wide = tree.accuracy(Beam(copies=4, width=2), score)
  assert found[1] < wide < 1


# Random scores ---------------------------------------------------------------


def test_the_best_of_random_scores_is_pass_at_1_in_expectation():
  """Over all orders of scores, of every k of the pool, and of one choice."""
  correct = np.array([1, 0, 0, 1, 0], bool)
  orders = [np.array(x, float) for x in itertools.permutations(range(5))]
  for k in range(1, 6):
    found = np.mean([estimators.best_of_k(x, correct, k) for x in orders])
    assert found == pytest.approx(correct.mean())
  rule, texts = BestOf(Last()), [(i,) for i in range(5)]
  right = dict(zip(texts, correct, strict=True))
  chosen = [
    rule([Path(0, i, 1, ((i,),), (x / 5,)) for i, x in enumerate(order)], texts)
    for order in orders
  ]
  found = np.mean([sum(p * right[x] for x, p in c.items()) for c in chosen])
  assert found == pytest.approx(correct.mean())


# Whole pools -----------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 8, 12])
def test_coverage_of_every_pool_is_the_mean_over_its_subsets(n):
  for k in range(1, n + 1):
    subsets = np.array(list(itertools.combinations(range(n), k)))
    for c in range(n + 1):
      # The first c samples are right.
      expected = (subsets[:, 0] < c).mean()
      assert estimators.pass_at_k(n, c, k) == pytest.approx(expected)


def partitions(n, most=None):
  """Yields the numbers of samples with each answer, the largest first."""
  if n == 0:
    yield ()
  for first in range(min(n, most or n), 0, -1):
    for rest in partitions(n - first, first):
      yield (first, *rest)


@pytest.mark.parametrize("n", [3, 7, 12])
def test_votes_of_every_pool_are_the_mean_over_its_subsets(n):
  """Subsets with the same numbers of each answer vote alike."""
  for counts in partitions(n):
    right = len(counts) // 2  # neither the first answer nor the last one
    answers = [i for i, m in enumerate(counts) for _ in range(m)]
    correct = [answer == right for answer in answers]
    won = np.zeros(n + 1)
    for drawn in itertools.product(*(range(m + 1) for m in counts)):
      ways = math.prod(map(math.comb, counts, drawn))
      if drawn[right] == max(drawn) > 0:
        won[sum(drawn)] += ways / drawn.count(max(drawn))
    for k in range(1, n + 1, 1 if n < 12 else 3):
      found = estimators.majority_at_k(answers, correct, k)
      assert found == pytest.approx(won[k] / math.comb(n, k))


@pytest.mark.parametrize("ties", [2, 12])
def test_the_best_of_every_subset_of_twelve(ties):
  rng = np.random.default_rng(ties)
  score, correct = rng.integers(ties, size=12), rng.random(12) < 0.4
  for k in range(1, 13):
    means = []
    for subset in itertools.combinations(range(12), k):
      own = list(subset)
      best = score[own] == score[own].max()
      means.append(correct[own][best].mean())
    found = estimators.best_of_k(score.astype(float), correct, k)
    assert found == pytest.approx(np.mean(means))
