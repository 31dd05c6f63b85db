"""Evaluation: what each baseline gets to see, and the report's numbers."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from research.typing import UserError
from research.vlm import evaluation, scenes

TASK = scenes.PopeShapes(count=120, size=32)


def _oracle(task):
  """Returns a model that knows each image's answer to each question."""
  known = {}
  for x in task:
    known[x.image.tobytes(), x.question] = x.answer

  def answer(images, questions):
    return [
      known.get((image.tobytes(), question), "Maybe.")
      for (image,), question in zip(images, questions, strict=True)
    ]

  return answer


@pytest.fixture(scope="module")
def report():
  return evaluation.evaluate(TASK, _oracle(TASK), TASK.rules(200), batch=50)


def test_a_model_that_sees_is_right_with_its_images_alone(report):
  result = report.result("real")
  wilson = stats.binomtest(120, 120).proportion_ci(method="wilson")
  assert result == pytest.approx((1, wilson.low, 1, 120))
  assert report.result("blind").score == 0
  assert report.invalid("blind") == 1 and report.invalid("real") == 0
  # With the image of another sample it answers that one's question.
  order = evaluation.shuffled_images(report.samples)
  for i, x in enumerate(report.samples):
    other = report.samples[order[i]]
    if other.question == x.question:
      assert report.answers["shuffled"][i] == other.answer
  assert 0.3 < report.result("shuffled").score < 0.7
  assert set(report.scores) == {"real", "blind", "shuffled", *TASK.RULES}
  for name, rule in TASK.rules(200).items():
    drawn = [TASK.drawn(i) for i in range(120)]
    right = [a == x.answer for a, x in zip(rule(drawn), drawn, strict=True)]
    assert report.result(name).score == np.mean(right)


def test_strata_add_up(report):
  groups = report.groups()
  assert [s for _, s in groups] == ["adversarial", "popular", "random"]
  for system in ("real", "shuffled", "colour only"):
    parts = [report.result(system, *group) for group in groups]
    total = sum(x.score * x.n for x in parts)
    assert sum(x.n for x in parts) == 120
    assert total == pytest.approx(120 * report.result(system).score)
  numbers = report.yes_no("real", "exists", "random")
  assert numbers.f1 == 1 and numbers.n == report.within("", "random").sum()
  with pytest.raises(UserError, match="no sample of kind 'count'"):
    report.result("real", "count")


def test_margins_are_over_the_best_baseline(report):
  means = {
    name: report.result(name, "exists", "popular").score
    for name in report.systems("exists", "popular")
    if name != "real"
  }
  margin = report.margin("exists", "popular")
  assert margin.baseline == max(means, key=means.get) == "both somewhere"
  assert margin.difference == pytest.approx(1 - max(means.values()))
  assert margin.low < margin.difference <= margin.high
  # Where the best baseline is as good, the margin is not known to be 0.
  same = dataclasses.replace(
    report, scores=report.scores | {"blind": report.scores["real"]}
  ).margin()
  assert same.low < same.difference == 0 < same.high


def test_tables_have_every_number(report):
  text = str(report)
  lines = text.splitlines()
  assert lines[0].split()[:4] == ["exists", "n", "real", "95%"]
  assert [x.split()[0] for x in lines[1:]] == (
    ["adversarial", "popular", "random", "all"]
  )
  for name in report.scores:
    assert name in lines[0]
  assert lines[-1].split()[1:6] == ["120", "100.0", "96.9", "to", "100.0"]
  markdown = report.markdown().splitlines()
  assert len(markdown) == len(lines) + 1 and markdown[1].startswith("| ---")
  found = report.to_json()
  assert set(found) == {
    "all",
    "exists",
    *(f"exists/{s}" for _, s in report.groups()),
  }
  assert found["exists/random"]["systems"]["blind"]["score"] == 0


def test_counts_are_groups_with_the_models_own_baselines():
  """A rule that always says 3 has all of "count = 3" right: none is there."""
  task = scenes.Shapes(kinds=("count",), count=60, size=32)
  oracle = _oracle(task)

  def answer(images, questions):
    """Says one too few from 3 on, and 0 of images that it does not know."""
    found = [x.replace("Maybe.", "0") for x in oracle(images, questions)]
    return [str(int(x) - (int(x) >= 3)) for x in found]

  found = evaluation.evaluate(task, answer, task.rules()).to_json()
  counts = [str(i) for i in range(task.max_count + 1)]
  assert [x for x in found if " = " in x] == [f"count = {i}" for i in counts]
  for i in counts:
    shown = found[f"count = {i}"]["systems"]
    assert list(shown) == ["real", "blind", "shuffled"]
    assert shown["real"]["score"] == (i in "012")
    assert shown["blind"]["score"] == (i == "0")
    assert shown["real"]["n"] == sum(x.answer == i for x in task)
  free = scenes.ShapeCaptions(count=8)
  report = evaluation.evaluate(free, lambda _, x: [""] * len(x), {})
  assert not any(" = " in x for x in report.to_json())


def test_shuffled_images_are_never_ones_own_and_of_the_same_question():
  samples = [TASK.drawn(i) for i in range(120)]
  order = evaluation.shuffled_images(samples)
  assert sorted(order) == list(range(120))
  assert all(i != j for i, j in enumerate(order))
  counts = {}
  for x in samples:
    counts[x.question] = counts.get(x.question, 0) + 1
  same = [
    samples[j].question == x.question
    for x, j in zip(samples, order, strict=True)
  ]
  often = [counts[x.question] > 1 for x in samples]
  assert sum(often) > 100
  assert all(s for s, o in zip(same, often, strict=True) if o) or (
    len([o for o in often if not o]) == 1
  )
  assert order != evaluation.shuffled_images(samples, seed=1)


@pytest.mark.parametrize("of_each, questions", [(2, 2), (3, 1), (6, 3)])
def test_shuffled_images_are_other_pictures(of_each, questions):
  """Of records that ask several questions about a picture."""
  base, count = TASK.drawn(0), 12
  samples = [
    dataclasses.replace(base, question=f"q{i % questions}")
    for i in range(count)
  ]
  pictures = [i // of_each for i in range(count)]
  for seed in range(20):
    order = evaluation.shuffled_images(samples, seed, pictures)
    assert sorted(order) == list(range(count))
    assert all(pictures[i] != pictures[j] for i, j in enumerate(order))
    alone = evaluation.shuffled_images(samples, seed)
    assert evaluation.shuffled_images(samples, seed, range(count)) == alone


def test_shuffled_images_of_an_evaluation_are_other_pictures():
  """Four questions about each of three pictures; shapes count as well."""
  drawn = [TASK.drawn(i) for i in range(12)]
  images = [np.full((4, 4, 3), 9, np.uint8), np.full((2, 8, 3), 9, np.uint8)]
  images.append(np.zeros((4, 4, 3), np.uint8))
  samples = [
    dataclasses.replace(x, images=(images[i // 4],), question="q")
    for i, x in enumerate(drawn)
  ]
  seen = []

  def answer(images, questions):
    seen.append([image for (image,) in images])
    return ["yes"] * len(questions)

  evaluation.evaluate(samples, answer, {})
  real, _, shuffled = seen
  assert not any(map(np.array_equal, real, shuffled))


def test_a_question_that_occurs_once_gets_another_image_of_its_kind():
  base = TASK.drawn(0)

  def order(*texts):
    some = [dataclasses.replace(base, question=t, kind=t[0]) for t in texts]
    return evaluation.shuffled_images(some)

  for texts in (
    ("a1", "a2"),
    ("a1", "a1", "a2"),
    ("a1", "b1"),
    ("a1", "b", "c"),
  ):
    found = order(*texts)
    assert sorted(found) == list(range(len(texts)))
    assert all(i != j for i, j in enumerate(found)), texts
  found = order("a1", "a2", "b1", "b2")
  assert found == [1, 0, 3, 2]
  with pytest.raises(UserError, match="expected two at least"):
    order("a1")


def test_an_invalid_answer_is_wrong_and_the_parser_says_which():
  def verbose(images, questions):
    return ["Yes, it is."] * len(questions)

  some = dataclasses.replace(TASK, count=40)
  exact = evaluation.evaluate(some, verbose, {})
  first = evaluation.evaluate(some, verbose, {}, parser=evaluation.first_choice)
  yes = np.mean([some.drawn(i).answer == "yes" for i in range(40)])
  assert (exact.result().score, exact.invalid()) == (0, 1)
  assert (first.result().score, first.invalid()) == (yes, 0)
  assert first.yes_no().yes_ratio == 1
  with pytest.raises(UserError, match="found 1 answers to 40 questions"):
    evaluation.evaluate(some, lambda images, questions: ["yes"], {})


def test_blind_images_are_zeros_of_the_same_shapes():
  shapes = []

  def answer(images, questions):
    shapes.append([[(x.shape, x.any()) for x in found] for found in images])
    return ["1"] * len(questions)

  task = scenes.MultiImage(count=4, images=2)
  evaluation.evaluate(task, answer, task.rules(10))
  real, blind, shuffled = shapes
  for a, b, c in zip(real, blind, shuffled, strict=True):
    assert a == c == [((48, 48, 3), True)] * 2
    assert b == [((48, 48, 3), False)] * 2
