"""Estimates from one pool against the mean over all subsets, and scipy."""

import fractions
import itertools
import math
import statistics

import numpy as np
import pytest
from scipy import integrate, stats

from research.errors import UserError
from research.search import estimators

POOLS = [  # answers, verdicts, weights; None is no vote
  ("aabbc", (1, 1, 0, 0, 0), (0.9, 0.1, 0.5, 0.5, 0.2)),
  ("abcabn", (1, 0, 0, 1, 0, 0), (0.3, 0.3, 0.3, 0.3, 0.3, 1.0)),
  ("aabbcn", (1, 1, 1, 1, 0, 0), (0.1, 0.2, 0.3, 0.4, 1.0, 0.5)),
  ("nnan", (0, 0, 1, 0), (1, 1, 0, 1)),
  ("nnn", (0, 0, 0), (1, 1, 1)),
  ("abbbccaa", (1, 0, 0, 0, 0, 0, 1, 1), (1, 2, 3, 1, 2, 3, 1, 2)),
  # A grader accepts two of three forms of one answer.
  ("aaabbn", (1, 0, 1, 0, 0, 0), (0.2, 0.9, 0.3, 0.5, 0.4, 0.1)),
]


def _pool(pool):
  answers, correct, weights = pool
  return (
    [None if x == "n" else x for x in answers],
    [bool(x) for x in correct],
    [float(x) for x in weights],
  )


def _brute(n, k, statistic):
  return statistics.mean(
    statistic(subset) for subset in itertools.combinations(range(n), k)
  )


def _vote(answers, correct, weights, subset):
  """Returns the chance of a correct winner, ties shared, by counting."""
  sums = {}
  for i in subset:
    if answers[i] is not None:
      sums[answers[i]] = sums.get(answers[i], 0) + weights[i]
  if not sums:
    return 0.0
  most = max(sums.values())
  best = [x for x, total in sums.items() if math.isclose(total, most)]
  shares = [
    statistics.mean(float(correct[i]) for i in subset if answers[i] == x)
    for x in best
  ]
  return statistics.mean(shares)


@pytest.mark.parametrize("pool", POOLS, ids=lambda x: x[0])
def test_estimates_are_means_over_all_subsets(pool):
  answers, correct, weights = _pool(pool)
  n, truth = len(answers), np.array(correct)
  scores, ones = np.array(weights), [1] * n  # scores have ties

  def best(subset):
    chosen = scores[list(subset)]
    return truth[list(subset)][chosen == chosen.max()].mean()

  for k in range(1, n + 1):
    found = estimators.pass_at_k(n, int(truth.sum()), k)
    assert found == pytest.approx(_brute(n, k, lambda s: any(truth[list(s)])))
    found = estimators.best_of_k(scores, truth, k)
    assert found == pytest.approx(_brute(n, k, best))
    found = estimators.majority_at_k(answers, correct, k)
    expected = _brute(n, k, lambda s: _vote(answers, correct, ones, s))
    assert found == pytest.approx(expected)
    found = estimators.weighted_majority_at_k(answers, weights, correct, k)
    expected = _brute(n, k, lambda s: _vote(answers, correct, weights, s))
    assert found.value == pytest.approx(expected)
    assert found.error == 0


@pytest.mark.parametrize("pool", POOLS, ids=lambda x: x[0])
def test_the_order_of_samples_changes_nothing(pool):
  answers, correct, weights = _pool(pool)
  order = np.random.default_rng(0).permutation(len(answers))
  mixed = [[values[i] for i in order] for values in (answers, correct, weights)]
  for k in (1, 2, len(answers)):
    for estimate in (
      lambda a, c, w, k=k: estimators.majority_at_k(a, c, k),
      lambda a, c, w, k=k: estimators.best_of_k(np.array(w), np.array(c), k),
      lambda a, c, w, k=k: estimators.weighted_majority_at_k(a, w, c, k).value,
    ):
      assert estimate(answers, correct, weights) == pytest.approx(
        estimate(*mixed)
      )


@pytest.mark.parametrize(
  ("n", "c", "k", "expected"),
  [
    (5, 1, 2, 0.4),
    (10, 3, 4, 5 / 6),
    (16, 2, 8, 23 / 30),
    (200, 1, 100, 0.5),
    (20, 0, 5, 0),
    (8, 8, 3, 1),
  ],
)
def test_pass_at_k_is_that_of_human_eval(n, c, k, expected):
  assert estimators.pass_at_k(n, c, k) == pytest.approx(expected)
  drawn = stats.hypergeom(n, c, k)
  assert estimators.pass_at_k(n, c, k) == pytest.approx(1 - drawn.pmf(0))


@pytest.mark.parametrize(
  ("counts", "k", "expected"),
  [
    ((3, 2, 1), 3, 3 / 5),
    ((3, 2, 1), 4, 7 / 10),
    ((2, 3, 1, 1, 1), 4, 37 / 140),
    ((4, 4), 5, 1 / 2),
    ((5, 3, 3, 1), 6, 13 / 21),
  ],
)
def test_majorities_are_the_fractions_of_the_specification(counts, k, expected):
  answers = [i for i, count in enumerate(counts) for _ in range(count)]
  correct = [answer == 0 for answer in answers]
  found = estimators.majority_at_k(answers, correct, k)
  assert found == pytest.approx(expected, rel=1e-12)


def test_best_of_k_is_the_example_of_the_specification():
  scores = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
  correct = np.array([0, 1, 1, 0, 0], bool)
  found = [estimators.best_of_k(scores, correct, k) for k in range(1, 6)]
  assert found == pytest.approx([0.4, 0.5, 0.4, 0.2, 0])


def test_large_pools_neither_overflow_nor_lose_precision():
  n = 3000  # C(3000, 1500) has 900 digits
  rng = np.random.default_rng(0)
  scores, correct = rng.random(n), rng.random(n) < 0.3
  every = estimators.best_of_k(scores, correct, n)
  assert every == pytest.approx(float(correct[scores.argmax()]), abs=1e-9)
  flat = estimators.best_of_k(np.zeros(n), correct, 1500)
  assert flat == pytest.approx(correct.mean())
  answers = ["a"] * 1000 + ["b"] * 1000 + [None] * 1000
  right = [x == "a" for x in answers]
  assert estimators.majority_at_k(answers, right, 5) == pytest.approx(
    # None has a third of the draws; what is left is symmetric.
    (1 - stats.hypergeom(3000, 2000, 5).pmf(0)) / 2
  )


@pytest.mark.parametrize(
  ("counts", "k"),
  [
    ((1100, 1100, 0), 3),
    ((1500, 2500, 100), 1),
    ((60, 40, 2000), 5),
    ((900, 1200, 1300), 16),
    ((1200, 1000, 0), 1000),
    ((1300, 1200, 1100), 3600),
  ],
)
def test_votes_of_large_pools_are_counted_exactly(counts, k):
  """One answer has more ways than a float holds: C(1100, 550) is 10^329."""
  right, wrong, silent = counts
  ways = 0  # twice, since a tie is won half of the time
  for i in range(1, min(right, k) + 1):
    for j in range(max(0, k - i - silent), min(wrong, k - i, i) + 1):
      of = math.comb(right, i) * math.comb(wrong, j)
      ways += (1 + (i > j)) * of * math.comb(silent, k - i - j)
  expected = fractions.Fraction(ways, 2 * math.comb(sum(counts), k))
  answers = ["a"] * right + ["b"] * wrong + [None] * silent
  found = estimators.majority_at_k(answers, [x == "a" for x in answers], k)
  assert found == pytest.approx(float(expected), rel=1e-9)


def test_equal_scores_make_every_selector_pass_at_1():
  answers, correct, _ = _pool(POOLS[0])
  truth = np.array(correct)
  for k in (1, 3, 5):
    found = estimators.best_of_k(np.full(5, -np.inf), truth, k)
    assert found == pytest.approx(truth.mean())


def test_none_is_no_vote_whatever_it_weighs():
  assert estimators.vote([None, None, "a", "b"]) == {"a": 0.5, "b": 0.5}
  assert estimators.weighted_vote([None, "a"], [9, 0.1]) == {"a": 1}
  assert estimators.vote([None]) == {}
  # A zero weight still names an answer, as there is no other.
  assert estimators.weighted_vote(["a"], [0]) == {"a": 1}
  # Sums that differ by rounding are equal.
  tied = estimators.weighted_vote(list("aaab"), [0.1, 0.1, 0.1, 0.3])
  assert tied == {"a": 0.5, "b": 0.5}


def test_draws_agree_with_enumeration_and_groups_stay_together():
  rng = np.random.default_rng(0)
  values = rng.random(24)

  def largest(subset):
    return values[list(subset)].max()

  exact = _brute(24, 5, largest)
  drawn = estimators.mean_over_subsets(largest, 24, 5, draws=2000)
  assert 0 < drawn.error < 0.01
  assert drawn.value == pytest.approx(exact, abs=4 * drawn.error)
  again = estimators.mean_over_subsets(largest, 24, 5, draws=2000)
  assert again == drawn
  # Subtrees of two: a unit is a subtree.
  trees = values.reshape(12, 2)
  found = estimators.mean_over_subsets(lambda s: trees[list(s)].max(), 12, 2)
  assert found.value == pytest.approx(
    _brute(12, 2, lambda s: trees[list(s)].max())
  )


def test_intervals_are_those_of_scipy():
  rng = np.random.default_rng(0)
  first = (rng.random(300) < 0.5).astype(float)
  second = (rng.random(300) < 0.4).astype(float)
  found = estimators.paired_difference(first, second, 4000)
  theirs = stats.bootstrap(
    (first - second,),
    np.mean,
    n_resamples=4000,
    method="percentile",
    batch=500,
    random_state=np.random.default_rng(1),
  ).confidence_interval
  assert found.value == pytest.approx(np.mean(first - second))
  assert found.low == pytest.approx(theirs.low, abs=0.006)
  assert found.high == pytest.approx(theirs.high, abs=0.006)
  assert (found.problems, found.seeds) == (300, 1)
  assert estimators.paired_difference(first, first).low <= 0
  tied = estimators.paired_difference(first, first)
  assert tied.low < 0 < tied.high  # 300 ties do not show that there are no wins
  three = np.stack([first] * 3)
  tied = estimators.paired_difference(three, three)
  assert tied.low < 0 < tied.high
  wilson = stats.binomtest(0, 300).proportion_ci(method="wilson")
  none = estimators.mean_accuracy(np.zeros(300))
  assert (none.low, none.high) == pytest.approx((0, wilson.high))
  assert estimators.paired_difference(first + 1, first).low > 0


def test_seeds_that_disagree_widen_the_interval():
  rng = np.random.default_rng(0)
  noise = rng.normal(0, 0.1, (3, 200))
  none = np.zeros((3, 200))
  alike = estimators.paired_difference(noise, none, 2000)
  apart = estimators.paired_difference(
    noise + np.array([[-0.2], [0], [0.2]]), none, 2000
  )
  assert apart.high - apart.low > 3 * (alike.high - alike.low)
  # Three seeds of the same answers are no more problems than one.
  one = estimators.paired_difference(noise[0], none[0], 2000)
  three = estimators.paired_difference(
    np.stack([noise[0]] * 3), none, 2000, seed=1
  )
  assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.1)
  assert "a bootstrap of 3" in three.note and not one.note


def test_closed_forms_are_those_of_the_specification():
  divergence = estimators.best_of_n_divergence
  found = [divergence(n) for n in (1, 4, 16, 256)]
  assert found == pytest.approx([0, 0.636, 1.835, 4.549], abs=5e-4)
  # The density of the best of n uniform scores is n u^(n - 1).
  exact, _ = integrate.quad(lambda u: 4 * u**3 * math.log(4 * u**3), 0, 1)
  assert divergence(4) == pytest.approx(exact)
  curve = [estimators.beta_pass_at_k(0.3, 3, k) for k in (1, 10, 100, 1000)]
  assert curve == pytest.approx([0.0909, 0.3734, 0.6656, 0.8312], abs=5e-5)
  noisy = [estimators.noisy_best_of_n(0.3, 0.9, 0.1, n) for n in (1, 2, 4, 16)]
  assert noisy == pytest.approx([0.3, 0.468, 0.652, 0.793], abs=5e-4)
  limit = estimators.noisy_best_of_n(0.3, 0.9, 0.1, 10_000)
  assert limit == pytest.approx(0.27 / 0.34)
  tries = estimators.tries_until_success(0.25, 8)
  assert tries == pytest.approx(sum(0.75**i for i in range(8)))
  assert estimators.tries_until_success(0, 8) == 8


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_noisy_verifiers_accuracy_is_the_enumeration(n):
  p, t, f = 0.3, 0.9, 0.2
  total = 0.0
  states = list(itertools.product((0, 1), (0, 1)))  # correct, accepted
  for samples in itertools.product(states, repeat=n):
    chance = math.prod(
      (p if c else 1 - p) * ((t if c else f) if a else 1 - (t if c else f))
      for c, a in samples
    )
    accepted = [c for c, a in samples if a] or [c for c, _ in samples]
    total += chance * statistics.mean(accepted)
  assert estimators.noisy_best_of_n(p, t, f, n) == pytest.approx(total)
  assert estimators.noisy_best_of_n(p, 1, 1, n) == pytest.approx(p)
  assert estimators.noisy_best_of_n(p, 0, 0, n) == pytest.approx(p)


def test_coverage_is_extrapolated_by_a_decade():
  law = estimators.PowerLaw(a=-2.5, b=-0.4)
  ks = (1, 2, 5, 10, 20, 50, 100)
  found = estimators.fit_power_law(ks, [law(k) for k in ks])
  assert (found.a, found.b) == pytest.approx((law.a, law.b))
  # Of a Beta mixture it is an approximation: two points at ten times the k.
  curve = [estimators.beta_pass_at_k(0.3, 3, k) for k in ks]
  found = estimators.fit_power_law(ks, curve)
  assert found(1000) == pytest.approx(0.8312, abs=0.02)
  # Precise values count more.
  off = [*curve[:-1], 0.9]
  sure = [1e-6] * 6 + [1.0]
  assert estimators.fit_power_law(ks, off, sure)(1000) == pytest.approx(
    estimators.fit_power_law(ks[:-1], curve[:-1])(1000), abs=1e-3
  )


def test_a_beta_fit_recovers_the_mixture():
  rng = np.random.default_rng(0)
  samples = np.full(3000, 50)
  correct = rng.binomial(samples, rng.beta(0.3, 3, 3000))
  found = estimators.fit_beta(samples, correct)
  assert (found.alpha, found.beta) == pytest.approx((0.3, 3), rel=0.1)
  assert found(1000) == pytest.approx(0.8312, abs=0.02)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: estimators.pass_at_k(1, 1, 10), "k = 10 of 1 samples"),
    (lambda: estimators.pass_at_k(5, 6, 2), "6 correct of 5"),
    (
      lambda: estimators.best_of_k(np.array([math.nan]), np.array([True]), 1),
      "not a number",
    ),
    (lambda: estimators.majority_at_k("aa", [True], 1), "1 verdicts of 2"),
    (lambda: estimators.weighted_vote("ab", [1, math.nan]), "weight nan"),
    (lambda: estimators.weighted_vote("ab", [1, -1]), "weight -1"),
    (
      lambda: estimators.vote([]) or estimators.majority_at_k([], [], 1),
      "k = 1 of 0",
    ),
    (
      lambda: estimators.paired_difference(np.ones(3), np.ones(4)),
      "same problems",
    ),
    (
      lambda: estimators.paired_difference(np.array([math.nan]), np.ones(1)),
      "not finite",
    ),
    (lambda: estimators.fit_power_law([1, 2], [0.0, 0.5]), "solve nothing"),
    (lambda: estimators.fit_power_law([1, 1], [0.1, 0.5]), "two different"),
    (
      lambda: estimators.fit_beta(np.full(3, 5), np.zeros(3, int)),
      "all unsolved",
    ),
  ],
)
def test_nonsense_is_refused(make, message):
  with pytest.raises(UserError, match=message):
    make()
