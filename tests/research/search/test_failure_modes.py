"""How searches by a reward model go wrong, each shown by its test.

Section 12 of what is known of them; where another file has the test, its name
is said here.

1. over-optimisation: here; `prm/test_scores` for the last step's score
2. length: here; `prm/test_scores`, `prm/test_attacks`
3. segmentation: here; `prm/test_scores`
4. verifier noise: here; `test_estimators`
5. value or correctness: here; `prm/test_scores`
6. shift of the policy, by selection and by another policy: here
7. an outcome model in disguise: here; `prm/test_scores`
8. diversity: here
9. extraction: `reasoning/test_extraction`, `test_grading`; `test_choose`
10. contamination: `reasoning/test_gym`, `test_countdown`
11. what the verifier reads: here; `test_cached_verifier`
"""

import collections
import dataclasses
import math

import numpy as np
import pytest
from scipy import optimize
from sklearn import linear_model

from research.generation.generated import NO_TOKEN
from research.prm import attacks, labels, scores
from research.prm.labelled import LabelledSolution
from research.prm.labels.rollouts import Rollout
from research.search import estimators
from research.search.choose import BestOf
from research.search.engine import Engine
from research.search.strategies.beam import Beam
from research.search.strategies.diverse_trees import DiverseTrees
from research.search.strategies.independent import Independent
from research.search.strategies.rebase import Rebase
from tests.research.search import test_search as shared
from tests.research.search.test_search import Arbitrary, Watched, found

# 1. Over-optimisation --------------------------------------------------------


def pools(problems, seed, n=64):
  """Returns scores and correctness of samples: a few wrong ones are loved."""
  rng = np.random.default_rng(seed)
  correct = rng.random((problems, n)) < 0.4
  score = np.where(correct, 0.6, 0.4) + 0.15 * rng.standard_normal(
    (problems, n)
  )
  hacked = ~correct & (rng.random((problems, n)) < 0.02)
  return np.where(hacked, 1 + 0.1 * rng.random((problems, n)), score), correct


def curve(pool, ks):
  """Returns accuracy of the best of k, and the mean of its score."""
  rows = list(zip(*pool, strict=True))
  accuracy = [
    np.mean([estimators.best_of_k(s, c, k) for s, c in rows]) for k in ks
  ]
  # The mean of the largest of k scores, by order statistics.
  best = [
    np.mean(
      [
        sum(
          math.comb(i, k - 1) / math.comb(len(s), k) * x
          for i, x in enumerate(sorted(s))
        )
        for s, _ in rows
      ]
    )
    for k in ks
  ]
  return np.array(accuracy), np.array(best)


def test_scores_rise_while_accuracy_falls_and_held_out_problems_say_when():
  ks = (1, 2, 4, 8, 16, 32, 64)
  accuracy, best = curve(pools(150, 0), ks)
  assert (np.diff(best) > 0).all()
  turn = int(accuracy.argmax())
  assert 0 < turn < len(ks) - 1 and accuracy[-1] < accuracy[turn] - 0.1
  # N is chosen where its accuracy is not reported.
  reported, _ = curve(pools(150, 1), ks)
  assert reported[turn] > reported[-1] + 0.1
  assert reported[turn] > reported[0] + 0.05


# 2. and 3. Lengths and steps -------------------------------------------------


def test_paths_that_end_early_neither_win_nor_lose_by_it():
  """All paths compete at the end, in whatever order they ended."""
  lengths = collections.defaultdict(list)
  engine = Engine(
    policy=shared.policy(), verifier=Arbitrary(value=lambda tokens: 0.5)
  )
  for one in found(Independent(copies=4), engine):
    answers = [path.tokens for path in one.paths]
    for rule in (BestOf(scores.Last()), BestOf(scores.Geometric())):
      chances = rule(one.paths, answers)
      for path in one.paths:
        lengths[len(path.steps)].append(chances[path.tokens])
    # A product is another matter.
    short = BestOf(scores.Product())(one.paths, answers)
    fewest = min(len(path.steps) for path in one.paths)
    assert all(
      len(path.steps) == fewest for path in one.paths if path.tokens in short
    )
  assert len(lengths) > 1 and {x for row in lengths.values() for x in row} == {
    0.25
  }


def test_the_same_text_in_other_steps_has_another_product():
  solutions = [
    LabelledSolution(prompt="p", steps=("a b. ",) * n, labels=(1,) * n)
    for n in (2, 3, 4, 6)
  ]

  def model(solution):
    return [0.9 for _ in solution.steps]

  for attack, sign in ((attacks.Split(), -1), (attacks.Merged(), 1)):
    changed = [attack(x)[0] for x in solutions]
    assert ["".join(x.steps) for x in changed] == [
      "".join(x.steps) for x in solutions
    ]
    for name, moves in (
      ("product", True),
      ("min", False),
      ("geometric", False),
    ):
      one = scores.AGGREGATES[name]
      before, after = (
        np.array([one.weight(model(x)) for x in rows])
        for rows in (solutions, changed)
      )
      assert np.sign(np.round(after - before, 9)).tolist() == [sign * moves] * 4
      found_ = scores.segmentation_sensitivity(before, after)
      assert (found_.change > 1e-6) == moves


# 4. Noise --------------------------------------------------------------------


def test_true_and_false_positives_are_read_off_the_curve_of_best_of_n():
  """Decisions flipped with (t, f), samples drawn; the plateau is p t / a."""
  p, t, f, ns = 0.3, 0.9, 0.15, (1, 2, 4, 8, 16)
  rng = np.random.default_rng(0)
  correct = rng.random((800, 16)) < p
  accepted = rng.random(correct.shape) < np.where(correct, t, f)
  pool = list(zip(accepted.astype(float), correct, strict=True))
  measured = [
    np.mean([estimators.best_of_k(a, c, n) for a, c in pool]) for n in ns
  ]
  predicted = [estimators.noisy_best_of_n(p, t, f, n) for n in ns]
  # A standard error is below 0.5 / sqrt(800).
  assert np.abs(np.subtract(measured, predicted)).max() < 0.045

  def loss(x):
    curve = [estimators.noisy_best_of_n(p, x[0], x[1], n) for n in ns]
    return np.square(np.subtract(curve, measured)).sum()

  fit = optimize.minimize(loss, (0.5, 0.5), method="Nelder-Mead").x
  # What was planted, from the measured curve alone; and the ceiling p t / a.
  assert fit == pytest.approx([t, f], abs=0.05)
  ceiling = [p * x / (p * x + (1 - p) * y) for x, y in (fit, (t, f))]
  assert ceiling[0] == pytest.approx(ceiling[1], abs=0.02)


# 5. Value or correctness -----------------------------------------------------


def test_a_recoverable_error_is_wrong_and_worth_something():
  """Both labels are true; where they are from decides how they are used."""
  steps = ("1 + 1 = 3", "no: 1 + 1 = 2", "so 2")

  def check(before, step):
    return "error" if step.endswith("3") else "ok"

  def complete(prefixes, k):
    return [[Rollout((), True)] * k for _ in prefixes]

  correctness = labels.label_steps(steps, check)
  values = labels.soft(labels.monte_carlo(steps, True, complete, 4))
  assert correctness == (0, None, None) and tuple(values) == (1, 1, 1)
  by_value = scores.default_aggregate("monte_carlo_soft")
  by_step = scores.default_aggregate("exact_first_error")
  row = (0.05, 0.9, 0.95)  # a model that heard the error
  assert by_value.weight(row) > 0.9 > 0.1 > by_step.weight(row)


# 6. Shift --------------------------------------------------------------------


def test_a_verifier_promises_too_much_where_it_has_chosen():
  """Of all states, and of those that a beam went on from, each by itself.

  Selection takes what the verifier overestimates, however good it is on the
  policy's own states: a report of these alone hides it.
  """
  rng = np.random.default_rng(0)
  noise = collections.defaultdict(rng.standard_normal)

  def truth(tokens):
    return shared.score(tokens) > 0.5

  def value(tokens):
    logit = 1.5 * truth(tokens) - 0.75 + 2 * noise[tuple(tokens)]
    return float(1 / (1 + np.exp(-logit)))

  watched = Watched(inner=Beam(copies=4, width=4), copies=4)
  engine = Engine(policy=shared.policy(), verifier=Arbitrary(value=value))
  for seed in range(6):
    found(watched, engine, prompts=[[5 + seed, i, 2] for i in range(3)])
  rows = [
    (path.scores[-1], truth(path.tokens), bool(n))
    for paths, counts in watched.said
    for path, n in zip(paths, counts, strict=True)
  ]
  score, right, chosen = map(np.array, zip(*rows, strict=True))
  gap = [(score[x] - right[x]).mean() for x in (score > -1, chosen)]
  assert gap[1] > gap[0] + 0.1


def steps_of(policy, n, rng):
  """Returns bags of tokens of a policy's steps, and whether each is right.

  A token of the vocabulary is right or wrong by itself; a step is right if most
  of its tokens are. Policies differ in the tokens that they use.
  """
  weight = np.where(np.arange(40) % 2, 1.0, -1.0)
  tokens = rng.choice(40, (n, 5), p=policy)
  bags = (tokens[..., None] == np.arange(40)).sum(axis=1).astype(float)
  return bags, (bags @ weight > 0).astype(int)


def test_a_verifier_of_one_policy_is_worse_on_another_until_it_sees_it():
  """Trained on A, searched with B; more labels of A are no remedy."""
  rng = np.random.default_rng(0)
  tokens = np.arange(40)
  first, second = (
    x / x.sum() for x in (np.exp(-tokens / 5), np.exp(-(39 - tokens) / 5))
  )

  def auc(labelled, policy):
    bags, right = (np.concatenate(x) for x in zip(*labelled, strict=True))
    probe = linear_model.LogisticRegression().fit(bags, right)
    new, truth = steps_of(policy, 2000, np.random.default_rng(1))
    return scores.auc(probe.predict_proba(new)[:, 1], truth)

  own = [steps_of(first, 300, rng)]
  at_home, abroad = auc(own, first), auc(own, second)
  assert at_home > 0.95 and abroad < at_home - 0.1
  more = auc([*own, steps_of(first, 300, rng)], second)
  remedy = auc([*own, steps_of(second, 300, rng)], second)
  assert more < at_home - 0.1 and remedy > 0.95


# 7. An outcome model in disguise ---------------------------------------------


def test_a_model_that_learned_outcomes_has_its_minimum_at_the_end():
  """Two fits to the same traces; the labels of their steps differ.

  The error shows in its own step and in the answer, which is all that an
  outcome model has to look at.
  """
  rng = np.random.default_rng(0)
  traces, steps = 400, 6
  error = rng.integers(0, 2 * steps, traces)  # from `steps` on, none
  at = np.arange(steps)
  wrong_step = (at == error[:, None]).astype(float)
  wrong_answer = ((at == steps - 1) & (error < steps)[:, None]).astype(float)
  noise = 0.3 * rng.standard_normal((traces, steps, 2))
  features = np.stack([wrong_step, wrong_answer], axis=-1) + noise

  def fitted(labels, used):
    model = linear_model.LogisticRegression().fit(features[used], labels[used])
    return model.predict_proba(features.reshape(-1, 2))[:, 1].reshape(
      traces, steps
    )

  process = fitted(at < error[:, None], at <= error[:, None])
  whole = np.broadcast_to((error >= steps)[:, None], (traces, steps))
  outcome = fitted(whole, np.broadcast_to(at == steps - 1, (traces, steps)))
  inner = error < steps - 1
  shares = [scores.min_at_last(x[inner].tolist()) for x in (process, outcome)]
  assert shares[0] < 0.4 < shares[1]
  # Both find wrong answers: best-of-n alone would not tell them apart.
  for each in (process, outcome):
    assert scores.auc(each.min(axis=1), (error >= steps).astype(int)) > 0.85


# 8. Diversity ----------------------------------------------------------------


def roots(strategy):
  """Returns how many first steps are left at each step of each problem."""
  watched = Watched(inner=strategy, copies=strategy.copies)
  found(watched)
  left = collections.defaultdict(list)
  for paths, counts in watched.said:
    kept = {path.root for path, n in zip(paths, counts, strict=True) if n}
    left[paths[0].problem].append(len(kept))
  return left.values()


def test_a_beam_collapses_to_one_prefix_and_trees_do_not():
  beam = roots(Beam(copies=4, width=4))
  assert all(set(row) == {1} for row in beam)
  for row in roots(Beam(copies=4, width=2)):
    assert (np.diff(row) <= 0).all()
  trees = roots(DiverseTrees(copies=4, width=2))
  # Each tree has its own, until its paths have ended.
  assert all(row[0] == 2 for row in trees)
  texts = [
    [
      [path.steps[0][: shared.STEP] for path in one.paths]
      for one in found(strategy)
    ]
    for strategy in (Beam(copies=4, width=4), Independent(copies=4))
  ]
  collapsed, independent = (
    [scores.diversity([[str(x)] for x in row], row).first_steps for row in rows]
    for rows in texts
  )
  assert max(collapsed) <= 2 and min(independent) == 4


# 11. What the verifier reads -------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Transcript(Arbitrary):
  """Its state is every token that it was given, in their order."""

  def start(self, prompts, copies, max_new_tokens):
    return [()] * (len(prompts) * copies)

  def read(self, state, paths, new):
    state = [
      (*old, *(int(x) for x in row if x != NO_TOKEN))
      for old, row in zip(state, new, strict=True)
    ]
    for tokens, path in zip(state, paths, strict=True):
      assert tokens == path.tokens[: len(path.tokens) - shared.unread(path)]
    return state, np.array([self.value(tokens) for tokens in state])


@pytest.mark.parametrize(
  "strategy",
  [
    Beam(copies=4, width=2),
    DiverseTrees(copies=4, width=2),
    Rebase(copies=4),
  ],
  ids=lambda x: type(x).__name__,
)
def test_the_verifier_reads_what_the_policy_wrote_token_by_token(strategy):
  engine = Engine(policy=shared.policy(), verifier=Transcript())
  for one in found(strategy, engine):
    assert one.paths
