"""Metrics: what lmms-eval and pycocoevalcap score, and enumerations."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from research.typing import UserError
from research.vlm import evaluation
from research.vlm.evaluation import scores

GOLDEN = json.loads(
  (pathlib.Path(__file__).parents[3] / "golden/vlm_metrics.json").read_text()
)


# Answers ---------------------------------------------------------------------


def test_normal_forms_are_those_of_evalai_and_vqa():
  for text, evalai, vqa in GOLDEN["evalai"]:
    assert evaluation.evalai_normalize(text) == evalai, text
    assert evaluation.vqa_normalize(text) == vqa, text
  # The golden texts reach where the two forms differ.
  assert sum(a != b for _, a, b in GOLDEN["evalai"]) > 20


def test_vqa_accuracy():
  for prediction, answers, expected in GOLDEN["vqa"]:
    found = evaluation.vqa_accuracy(prediction, answers)
    assert found == pytest.approx(expected, abs=1e-12)
  assert 0.2 < np.mean([x[2] for x in GOLDEN["vqa"]]) < 0.95
  for agree, expected in [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)]:
    answers = ["a cat"] * agree + [f"dog {i}" for i in range(10 - agree)]
    assert evaluation.vqa_accuracy("Cat.", answers) == pytest.approx(expected)
  for count, expected in [(2, 1 / 3), (3, 2 / 3), (4, 1)]:
    found = evaluation.vqa_accuracy("a cat", ["cat"] * count)
    assert found == pytest.approx(expected)
  for count in range(2):
    with pytest.raises(UserError, match=f"found {count} answers.*exact_match"):
      evaluation.vqa_accuracy("a", ["a"] * count)


def test_anls():
  for prediction, answers, expected in GOLDEN["anls"]:
    found = evaluation.anls(prediction, answers)
    assert found == pytest.approx(expected, abs=1e-12), (prediction, answers)
  # One of ten letters; half of them; fewer than half.
  assert evaluation.anls("abcdefghix", ["abcdefghij"]) == pytest.approx(0.9)
  assert evaluation.anls("abxx", ["abcd"]) == 0.5
  assert evaluation.anls("axxx", ["abcd"]) == 0


def test_levenshtein_by_enumeration():
  """The fewest edits: a shortest path over all texts of a small alphabet."""

  def edits(text):
    for i in range(len(text) + 1):
      for letter in "ab":
        yield text[:i] + letter + text[i:]
        yield text[:i] + letter + text[i + 1 :]
      yield text[:i] + text[i + 1 :]

  all_texts = [
    "".join(x) for n in range(4) for x in itertools.product("ab", repeat=n)
  ]
  for start in all_texts:
    distance, frontier = {start: 0}, [start]
    for text in frontier:
      for other in edits(text):
        if other not in distance and len(other) <= 5:
          distance[other] = distance[text] + 1
          frontier.append(other)
    for end in all_texts:
      assert scores.levenshtein(start, end) == distance[end]


def test_relaxed_accuracy():
  for prediction, answer, expected in GOLDEN["relaxed"]:
    found = evaluation.relaxed_accuracy(prediction, answer)
    assert found == float(expected), (prediction, answer)
  assert {x[2] for x in GOLDEN["relaxed"]} == {True, False}


# Yes and no ------------------------------------------------------------------


def test_pope_numbers():
  for said, truth, expected in GOLDEN["pope"]:
    found = evaluation.yes_no_scores(said, truth)
    assert found[:4] == pytest.approx(expected)
    assert found.yes_ratio == said.count("yes") / len(said)
    assert (found.invalid, found.n) == (0, len(said))


def test_invalid_answers_are_wrong_and_no_yes():
  said = ["yes", None, "no", None]
  found = evaluation.yes_no_scores(said, ["yes", "yes", "no", "no"])
  assert found == (0.5, 1.0, 0.5, pytest.approx(2 / 3), 0.25, 0.5, 4)
  assert evaluation.yes_no_scores(["no"], ["no"])[:5] == (1, 0, 0, 0, 0)
  with pytest.raises(UserError, match="parse the model's texts first"):
    evaluation.yes_no_scores(["Yes, there is"], ["yes"])
  with pytest.raises(UserError, match="found 1 predictions and 2 answers"):
    evaluation.yes_no_scores(["yes"], ["yes", "no"])


def test_parsers():
  choices = ("yes", "no")
  exact, first = evaluation.exact_choice, evaluation.first_choice
  assert [exact(x, choices) for x in ("Yes", " no. ", "Yes it is", "")] == (
    ["yes", "no", None, None]
  )
  assert exact(" Any Text. ", ()) == "Any Text"
  assert [first(x, choices) for x in ("Well, no!", "yesterday", "not")] == (
    ["no", None, None]
  )
  assert first("There are two of them, not 3.", ("2", "3")) == "2"
  assert first("It is dark red", ("red", "dark red", "blue")) == "red"
  assert first("It goes far to the left", ("to the left", "up high")) == (
    "to the left"
  )
  shapes = ("red circle", "blue square")
  assert first("A sacred circle; a blue square.", shapes) == "blue square"
  assert first("Not one: red circles.", shapes) is None
  assert first("None of them", ("none", "some")) == "none"
  assert first("None of them", ("0", "1")) == "0"
  # LLaVA: the first sentence's words, and all else is yes.
  llava = evaluation.llava_yes_no
  cases = {
    "No, there is not.": "no",
    "There is no dog. Yes.": "no",
    "Yes. No.": "yes",
    "NO": "yes",
    "I cannot say": "yes",
    "It is not": "no",
    "": "yes",
  }
  assert {x: llava(x, choices) for x in cases} == cases
  for text, expected in GOLDEN["mme_parser"]:
    expected = None if expected == "other" else expected
    assert evaluation.mme_yes_no(text) == expected, text


def test_mme_counts_pairs():
  answers, total = GOLDEN["mme"]
  found = evaluation.mme_scores(tuple(x) for x in answers)
  assert found.perception + found.cognition == pytest.approx(total)
  assert found.cognition == found.categories["code_reasoning"]
  pairs = [("count", "a", True), ("count", "a", False)]
  assert evaluation.mme_scores(pairs).perception == 50
  pairs += [("count", "b", True), ("count", "b", True)]
  assert evaluation.mme_scores(pairs).perception == (50 + 200) / 2
  with pytest.raises(UserError, match="image 'c' of 'count' has 1 answers"):
    evaluation.mme_scores([("count", "c", True)])


# Captions --------------------------------------------------------------------


# Boxes, counts, retrieval ----------------------------------------------------


def test_iou_is_that_of_pixels():
  one, two, expected = zip(*GOLDEN["iou"], strict=True)
  found = evaluation.box_iou(np.array(one), np.array(two))
  np.testing.assert_allclose(found, expected, rtol=1e-12)

  def mask(box):
    out = np.zeros((48, 48), bool)
    out[box[1] : box[3], box[0] : box[2]] = True
    return out

  pixels = evaluation.mask_iou(
    np.array([mask(x) for x in one]), np.array([mask(x) for x in two])
  )
  np.testing.assert_allclose(pixels, expected, rtol=1e-12)
  accuracy = evaluation.grounding_accuracy(np.array(one), np.array(one))
  assert accuracy == 1
  empty = np.array([[3, 3, 3, 3], [5, 5, 2, 9]])
  np.testing.assert_array_equal(evaluation.box_iou(empty, empty), [0, 0])
  none = np.zeros((4, 4), bool)
  assert evaluation.mask_iou(none, none) == 0


def test_boxes_in_texts():
  parse = evaluation.parse_box
  assert parse("It is at [0.1, .2, 0.3, 4,5]") == (0.1, 0.2, 0.3, 4)
  assert parse("3 things: [0.1, 0.25, 3, -4].") == (0.1, 0.25, 3, -4)
  assert parse("10 20 30 40") == (10, 20, 30, 40)
  assert parse("left") is None
  # Half of the box; a third of the union of both.
  assert evaluation.box_score("0 0 10 5", "0 0 10 10") == 1
  assert evaluation.box_score("0 5 10 15", "0 0 10 10") == 0
  assert evaluation.box_score("0 5 10 15", "0 0 10 10", threshold=0.33) == 1
  assert evaluation.box_score("nowhere", "0 0 10 10") == 0


def test_zero_shot_weights_are_of_normalised_prompts():
  """A long embedding weighs no more than a short one."""
  prompts = np.array([[[10.0, 0, 0], [0, 0.1, 0]], [[0, 0, 1], [0, 0, 5]]])
  weights = evaluation.zero_shot_weights(prompts)
  half = np.sqrt(0.5)
  np.testing.assert_allclose(weights, [[half, half, 0], [0, 0, 1]])
  images = np.array([[0.1, 3.0, 1.0], [0.0, 1, 30]])
  np.testing.assert_array_equal(evaluation.classify(images, weights), [0, 1])


def test_recall_by_enumeration():
  rng = np.random.default_rng(0)
  similarity = rng.normal(size=(40, 12))
  relevant = rng.random((40, 12)) < 0.15
  relevant[:, 0] |= ~relevant.any(1)
  found = evaluation.recall_at(similarity, relevant, (1, 3, 12))
  for k in (1, 3, 12):
    hits = [
      any(
        good and sum(other > value for other in row) < k
        for value, good in zip(row, goods, strict=True)
      )
      for row, goods in zip(similarity, relevant, strict=True)
    ]
    assert found[k] == np.mean(hits)
  assert found[1] < found[3] < found[12] == 1
  with pytest.raises(UserError, match="query 1 has no relevant item"):
    evaluation.recall_at(np.eye(2), np.array([[True, False], [False, False]]))
