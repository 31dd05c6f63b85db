"""Scores of steps: closed forms, scikit-learn, and published examples."""

import json
import math

import numpy as np
import pytest
from sklearn import calibration as sklearn_calibration
from sklearn import isotonic, metrics

from research.errors import UserError
from research.prm import scores
from research.prm.labelled import LabelledSolution
from research.prm.scores.aggregate import TRUNCATED_SOURCES, VALUE_SOURCES

TRACE = (0.9, 0.5, 0.8)


@pytest.mark.parametrize(
  ("aggregate", "score", "weight"),
  [
    (scores.Last(), 0.8, 0.8),
    (scores.Min(), 0.5, 0.5),
    (scores.Max(), 0.9, 0.9),
    (scores.Mean(), 2.2 / 3, 2.2 / 3),
    (scores.LastMean(2), 0.65, 0.65),
    (scores.LastMean(9), 2.2 / 3, 2.2 / 3),
    (scores.Product(), math.log(0.36), 0.36),
    (scores.Geometric(), math.log(0.36) / 3, 0.36 ** (1 / 3)),
  ],
)
def test_aggregates_are_their_formulas(aggregate, score, weight):
  assert aggregate(TRACE) == pytest.approx(score)
  assert aggregate.weight(TRACE) == pytest.approx(weight)
  assert aggregate(()) == -math.inf  # worse than any trace with steps
  assert aggregate.weight(()) == 0
  zero = aggregate((0.0,))
  assert zero >= aggregate(())
  assert aggregate.weight((0.0,)) == 0
  for bad, expected in ((math.nan, "finite"), (1.2, "prob"), (-0.1, "prob")):
    with pytest.raises(UserError, match=expected):
      aggregate((0.5, bad))


def test_products_of_many_steps_keep_their_order():
  long = [(0.001,) * 500, (0.002,) * 500]
  assert np.prod(long[1]) == 0  # underflows
  assert scores.Product()(long[1]) > scores.Product()(long[0])
  # Splitting a step in two changes a product; a geometric mean stays.
  assert scores.Product()((0.9,) * 4) < scores.Product()((0.9,) * 2)
  halves = [scores.Geometric()((0.9,) * n) for n in (2, 4)]
  assert halves[0] == pytest.approx(halves[1])


def test_last_steps_of_truncated_labels_must_not_choose():
  for source in TRUNCATED_SOURCES:
    for aggregate in (scores.Last(), scores.LastMean(2)):
      with pytest.raises(UserError, match="Product or Min"):
        scores.check_final_selection(aggregate, source)
    scores.check_final_selection(scores.default_aggregate(source), source)
    scores.check_final_selection(scores.Min(), source)
  for source in VALUE_SOURCES:
    assert scores.default_aggregate(source) == scores.Last()
    scores.check_final_selection(scores.Last(), source)
  with pytest.raises(UserError, match="label_source: found 'vibes'"):
    scores.default_aggregate("vibes")


def test_choosing_by_the_last_step_gets_worse_with_more_traces():
  """Section 17 of the specification, kept as a regression test.

  A model that was never trained on steps after an error likes some of them more
  than right ones. `Product` still sees the error.
  """
  rng = np.random.default_rng(0)
  accuracy = {}
  for n in (1, 2, 16):
    hits = {"last": [], "product": []}
    for _ in range(150):
      correct = rng.random(n) < 0.25
      right = rng.uniform(0.8, 0.95, (n, 3))
      wrong = right.copy()
      wrong[:, 1] = rng.uniform(0.2, 0.6, n)  # the error
      wrong[:, 2] = rng.uniform(0.7, 1, n)  # after it: anything
      traces = np.where(correct[:, None], right, wrong)
      for name, found in hits.items():
        ranked = np.array([scores.AGGREGATES[name](x) for x in traces])
        found.append(scores.best_of_n(ranked, correct))
    accuracy[n] = {name: np.mean(x) for name, x in hits.items()}
  assert accuracy[16]["last"] < accuracy[2]["last"] - 0.05
  assert accuracy[16]["last"] < accuracy[1]["last"] - 0.05
  assert accuracy[16]["product"] > accuracy[2]["product"] + 0.3


def _sample(n=150, seed=0):
  rng = np.random.default_rng(seed)
  values = rng.random(n)
  return values, (rng.random(n) < values**2).astype(int)


def test_calibration_is_that_of_scikit_learn():
  values, labels = _sample()
  assert scores.brier(values, labels) == pytest.approx(
    metrics.brier_score_loss(labels, values)
  )
  true, mean = sklearn_calibration.calibration_curve(
    labels, values, n_bins=15, strategy="quantile"
  )
  expected = np.abs(true - mean).mean()  # ten samples in each of 15 bins
  found = scores.expected_calibration_error(values, labels, 15)
  assert found == pytest.approx(expected)
  rounded = np.round(values, 1)  # with ties
  for some in (values, rounded):
    assert scores.auc(some, labels) == pytest.approx(
      metrics.roc_auc_score(labels, some)
    )
    fitted = isotonic.IsotonicRegression(out_of_bounds="clip")
    grid = np.linspace(-0.1, 1.1, 50)
    theirs = fitted.fit(some, labels).predict(grid)
    assert scores.fit_isotonic(some, labels)(grid) == pytest.approx(theirs)
  assert math.isnan(scores.auc(values, np.ones(150)))


def test_the_order_of_samples_changes_no_metric():
  values, labels = _sample()
  values = np.round(values, 1)
  mixed = np.random.default_rng(1).permutation(150)
  for metric in (scores.expected_calibration_error, scores.brier, scores.auc):
    assert metric(values, labels) == pytest.approx(
      metric(values[mixed], labels[mixed])
    )
  constant = np.full(150, 0.5)
  gap = abs(0.5 - labels.mean())
  assert scores.expected_calibration_error(constant, labels) == pytest.approx(
    gap
  )


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_scaling_finds_the_temperature(temperature):
  """Of labels that are the probabilities themselves, it is the optimum."""
  logits = np.linspace(-6, 6, 101)
  truth = 1 / (1 + np.exp(-logits / temperature))
  fitted = scores.fit_temperature(logits, truth)
  assert fitted.value == pytest.approx(temperature, rel=1e-4)
  assert fitted(logits) == pytest.approx(truth, abs=1e-4)


def test_auc_is_grouped_by_index_or_by_steps_to_go():
  traces = [[0.9, 0.1], [0.2, 0.8, 0.4], [0.5, 0.6]]
  labels = [[1, 0], [0, 1, None], [1, 1]]
  assert scores.auc_by(traces, labels)[0] == 1.0
  last = scores.auc_by(traces, labels, scores.by_steps_to_go)
  assert set(last) == {0, 1, 2}
  assert last[0] == 1.0  # 0.1 wrong, 0.6 right; the unknown one is left out
  assert math.isnan(last[1])  # all three are right


def test_processbench_is_the_example_of_the_specification():
  traces, labels = [[0.9, 0.4, 0.8], [0.9, 0.9], [0.3]], [1, -1, -1]
  predicted = [scores.first_error(x) for x in traces]
  found = scores.processbench(predicted, labels)
  assert found == (1.0, 0.5, 1, 2)
  assert found.f1 == pytest.approx(2 / 3)
  # An error's exact index counts, and what cannot be parsed is wrong.
  wrong = scores.processbench([0, None, 0], labels)
  assert (wrong.error, wrong.correct, wrong.f1) == (0, 0, 0)
  mean = scores.mean_f1({"gsm8k": found, "math": wrong})
  assert mean == pytest.approx(1 / 3)
  with pytest.raises(UserError, match="2 predictions and 3 labels"):
    scores.processbench([1, 1], labels)


def test_where_no_solution_has_an_error_no_share_of_them_is_found():
  """A perfect model has no F1 of 0 there, which would be the worst."""
  perfect = [LabelledSolution(prompt="p", steps=("a", "b"), labels=(1, 1))]
  report = scores.evaluate_steps(perfect, [[0.9, 0.9]])
  assert (report.first.correct, report.first.errors) == (1, 0)
  found = report.to_json()
  for name in ("f1", "f1_random", "accuracy_error"):
    assert found[name] is None
  right = scores.prmbench([[0.9, 0.9]], [[1, 1]], ["correct"])["correct"]
  assert math.isnan(right.first_error) and right.accuracy == 1


def test_published_f1_are_harmonic_means():
  """Qwen2.5-Math-PRM-7B's average over ProcessBench's subsets."""
  assert scores.mean_f1([82.4, 77.6, 67.5, 66.3]) == pytest.approx(73.45)


def test_a_judges_majority_ignores_what_it_could_not_say():
  assert scores.majority_index([None, 2, 1, 2, None, None]) == 2
  assert scores.majority_index([None]) is None


def test_prmbench_is_scikit_learns_f1_of_both_classes():
  rng = np.random.default_rng(0)
  traces = [rng.random(n).tolist() for n in (3, 5, 4, 6)]
  labels = [rng.integers(0, 2, len(x)).tolist() for x in traces]
  classes = ["circular", "confidence", "circular", "correct"]
  found = scores.prmbench(traces, labels, classes)
  assert set(found) == {"circular", "confidence", "correct", "all"}
  for name, rows in (("circular", (0, 2)), ("all", (0, 1, 2))):
    truth = np.concatenate([labels[i] for i in rows])
    called = np.concatenate([traces[i] for i in rows]) > 0.5
    both = metrics.f1_score(truth, called, average=None, zero_division=0)
    assert found[name].negative_f1 == pytest.approx(both[0])
    assert found[name].f1 == pytest.approx(both[1])
    assert found[name].accuracy == pytest.approx(np.mean(truth == called))
  first = [labels[i].index(0) for i in (0, 1, 2)]
  detected = [traces[i][at] <= 0.5 for i, at in enumerate(first)]
  assert found["all"].first_error == pytest.approx(np.mean(detected))
  # A model that calls everything right has no F1 of wrong steps.
  blind = scores.prmbench([[0.9] * 4], [[1, 1, 1, 0]], ["circular"])["all"]
  assert (blind.negative_f1, blind.first_error) == (0, 0)
  assert scores.similarity([0.9, 0.1], [0.9, 0.9]) == 0.5


def test_best_of_n_takes_a_random_one_of_equal_ones():
  correct = np.array([True, False, False, True])
  best = scores.best_of_n(np.array([0.1, 0.9, 0.9, 0.9]), correct)
  assert best == pytest.approx(1 / 3)
  assert scores.best_of_n(np.full(4, 0.5), correct) == correct.mean()
  only = scores.best_of_n(np.full(1, -np.inf), np.array([True]))
  assert only == 1
  with pytest.raises(UserError, match="not a number"):
    scores.best_of_n(np.array([np.nan, 1.0]), correct[:2])


def test_what_best_of_n_hides():
  traces = [[0.9, 0.2], [0.2, 0.9], [0.5], [0.3, 0.3]]
  assert scores.min_at_last(traces) == pytest.approx(1 / 3)
  detected = scores.wrong_process_detection(
    traces, [True, True, True, False], [False, True, False, False]
  )
  assert detected == 0.5  # of two right answers by wrong steps
  assert math.isnan(scores.wrong_process_detection([], [], []))
  assert scores.rank_correlation(
    np.array([0.1, 0.2, 0.9]), np.array([1.0, 2.0, 3.0])
  ) == pytest.approx(1)


def _solutions():
  return [
    LabelledSolution(prompt="p", steps=("a", "b", "c"), labels=row)
    for row in ((1, 0, None), (1, 1, 1), (1, None, 0))
  ]


def test_the_error_of_an_auc_is_that_of_resampled_problems():
  n, rng = 60, np.random.default_rng(0)
  owner = np.repeat(np.arange(n), rng.integers(2, 9, n))
  # A model likes right problems as a whole: their steps are alike.
  right, level = rng.choice([0.1, 0.9], n), rng.random(n)
  labels = (rng.random(len(owner)) < right[owner]).astype(int)
  values = labels + 4 * level[owner] + rng.standard_normal(len(owner))
  values = np.round(values, 1)  # with ties
  steps = [np.flatnonzero(owner == i) for i in range(n)]
  draws = [
    np.concatenate([steps[i] for i in x])
    for x in rng.integers(n, size=(1000, n))
  ]
  resampled = [scores.auc(values[x], labels[x]) for x in draws]
  error = scores.auc_error(values, labels, owner.tolist())
  # A bootstrap of 1,000 knows a deviation to 2%, and both differ by 1 / 60.
  assert error == pytest.approx(np.std(resampled), rel=0.08)
  # Steps on their own would say too little.
  assert scores.auc_error(values, labels, range(len(values))) < 0.8 * error


def test_a_report_has_what_its_parts_have():
  rows = [[0.9, 0.4, 0.8], [0.9, 0.3, 0.7], [0.6, 0.1, 0.65]]
  found = scores.evaluate_steps(_solutions(), rows)
  # The third one's first error is unknown.
  assert found.first == scores.processbench([1, 1], [1, -1])
  truth = np.array([1, 0, 1, 1, 1, 1, 0])
  values = np.array([0.9, 0.4, 0.9, 0.3, 0.7, 0.6, 0.65])
  assert found.auc == pytest.approx(metrics.roc_auc_score(truth, values))
  assert found.brier == pytest.approx(metrics.brier_score_loss(truth, values))
  assert found.base_rate == pytest.approx(5 / 7)
  assert (found.solutions, found.steps) == (3, 7)
  written = json.loads(json.dumps(found.to_json(), allow_nan=False))
  assert written["auc_error"] is None  # of one problem
  assert written["accuracy_error"] == 1
  assert written["f1"] == 0
  assert written["auc_step_1"] == 0  # .4 wrong, .3 right
  assert written["auc_step_0"] is None  # all right
  assert written["auc_0_to_go"] == 1


def test_random_scores_reach_on_average_what_their_closed_form_says():
  solutions = _solutions()
  found = scores.evaluate_steps(solutions, [[0.9] * 3] * 3, 0.3)
  rng = np.random.default_rng(0)
  draws = [
    scores.processbench(
      [scores.first_error(x, 0.3) for x in rng.random((2, 3))], [1, -1]
    )
    for _ in range(4000)
  ]
  chance = found.chance
  assert chance == scores.processbench_of_chance(solutions, 0.3)
  assert chance[:2] == pytest.approx((0.3 * 0.7, 0.7**3))
  for i in (0, 1):
    error = np.std([x[i] for x in draws]) / np.sqrt(len(draws))
    mean = np.mean([x[i] for x in draws])
    assert mean == pytest.approx(chance[i], abs=4 * error)
  assert (chance.errors, chance.corrects) == (1, 1)
  assert found.to_json()["f1_random"] == chance.f1
  with pytest.raises(UserError, match="found the threshold 2"):
    scores.processbench_of_chance(solutions, 2)


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    ([[0.9] * 3] * 2, "2 rows"),
    ([[0.9] * 3, [0.9] * 2, [0.9] * 3], "2 scores of solution 1"),
    ([[0.9, math.nan, 0.1]] * 3, r"scores\[1\]: found nan"),
    ([[0.9, 3.0, 0.1]] * 3, "sigmoid"),
  ],
)
def test_a_report_refuses_scores_that_do_not_fit(rows, message):
  with pytest.raises(UserError, match=message):
    scores.evaluate_steps(_solutions(), rows)


def test_a_score_that_is_not_a_number_neither_passes_nor_fails():
  """NaN < 0.5 is false: a diverged verifier would find no errors at all."""
  for judge in (
    scores.first_error,
    lambda x: scores.min_at_last([x]),
    lambda x: scores.prmbench([x], [[1, 0]], ["circular"]),
    lambda x: scores.wrong_process_detection([x], [True], [False]),
  ):
    with pytest.raises(UserError, match=r"scores\[0\]: found nan"):
      judge([math.nan, 0.9])


def test_products_favour_short_traces_and_means_do_not():
  rng = np.random.default_rng(0)
  steps = rng.integers(2, 9, 200)
  correct = rng.random(200) < 0.5
  traces = [rng.uniform(0.5, 1, n) for n in steps]

  def bias(name):
    ranked = np.array([scores.AGGREGATES[name](x) for x in traces])
    return scores.length_bias(ranked, steps, correct)

  assert bias("product") < -0.8
  assert abs(bias("geometric")) < 0.15
  # That wrong traces are longer, and score low, is no bias.
  longer = np.where(correct, 3, 5)
  assert math.isnan(scores.length_bias(correct.astype(float), longer, correct))


def test_cutting_steps_in_two_moves_products():
  traces = [[0.9, 0.8], [0.7], [0.95, 0.9, 0.85]]
  halves = [[x for x in trace for _ in range(2)] for trace in traces]
  for name, moved in (("product", True), ("min", False), ("geometric", False)):
    first, second = (
      np.array([scores.AGGREGATES[name](x) for x in rows])
      for rows in (traces, halves)
    )
    found = scores.segmentation_sensitivity(first, second)
    assert (found.change > 1e-9) == moved
  order = np.array([1.0, 2.0, 3.0])
  assert scores.segmentation_sensitivity(order, order[::-1].copy()).flips == 1
  tied = scores.segmentation_sensitivity(order, np.zeros(3))
  assert tied == (2.0, 0.5)
  # Products of two traces with a step of score 0, however it is cut.
  zeros = np.array([-np.inf, -np.inf, -1.0])
  found = scores.segmentation_sensitivity(zeros, zeros - [0, 0, 3])
  assert found == (1.0, 0.0)


def test_diversity_counts_first_steps_and_answers():
  traces = [["a", "b"], ["a", "c"], ["d"], []]
  assert scores.diversity(traces, ["1", "2", "1", None]) == (2, 2)
