"""Yes-no benchmarks: POPE's five numbers, and MME's pairs."""

import collections
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from research.typing import UserError

PERCEPTION = (
  *("existence", "count", "position", "color", "posters"),
  *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = (
  *("commonsense_reasoning", "numerical_calculation"),
  *("text_translation", "code_reasoning"),
)


class YesNoScores(NamedTuple):
  """POPE's numbers (Li et al. 2023, section 4); "yes" is positive.

  Attributes:
    accuracy: share of right answers.
    precision: share of right ones among the answers "yes"; 0 of none.
    recall: share of "yes" among what is there; 0 of none.
    f1: their harmonic mean.
    yes_ratio: share of "yes" among the model's answers, not the truths.
    invalid: share of answers that are neither; they are wrong.
    n: number of answers.
  """

  accuracy: float
  precision: float
  recall: float
  f1: float
  yes_ratio: float
  invalid: float
  n: int


def yes_no_scores(
  predictions: Sequence[str | None], answers: Sequence[str]
) -> YesNoScores:
  """Returns POPE's numbers.

  Args:
    predictions: parsed: "yes", "no", or None for an invalid answer.
    answers: "yes" or "no".

  Raises:
    UserError: not equally many of both, none, or another answer.
  """
  if len(predictions) != len(answers) or not answers:
    raise UserError(
      f"yes_no_scores: found {len(predictions)} predictions and {len(answers)}"
      " answers, expected as many, and one at least."
    )
  for name, found in (
    ("prediction", {*predictions} - {"yes", "no", None}),
    ("answer", {*answers} - {"yes", "no"}),
  ):
    if found:
      raise UserError(
        f"yes_no_scores: found {name} {min(found)!r}, expected 'yes' or 'no';"
        " parse the model's texts first (evaluation.parsers)."
      )
  n = len(answers)
  pairs = collections.Counter(zip(predictions, answers, strict=True))
  hit, said = pairs["yes", "yes"], pairs["yes", "yes"] + pairs["yes", "no"]
  positives = sum(x == "yes" for x in answers)
  precision = hit / said if said else 0.0
  recall = hit / positives if positives else 0.0
  return YesNoScores(
    accuracy=(hit + pairs["no", "no"]) / n,
    precision=precision,
    recall=recall,
    f1=2 * precision * recall / (precision + recall) if hit else 0.0,
    yes_ratio=said / n,
    invalid=sum(x is None for x in predictions) / n,
    n=n,
  )


class MME(NamedTuple):
  """MME's numbers (Fu et al. 2023, section 2.2).

  Attributes:
    categories: category -> 100 times accuracy plus accuracy+, 200 at most.
    perception: sum over its ten categories, 2000 at most.
    cognition: sum over its four, 800 at most.
  """

  categories: dict[str, float]
  perception: float
  cognition: float


def mme_scores(answers: Iterable[tuple[str, str, bool]]) -> MME:
  """Returns MME's numbers.

  Args:
    answers: (category, image, whether the answer is right); two an image.

  Raises:
    UserError: an image has not two questions.
  """
  images = collections.defaultdict(list)
  for category, image, right in answers:
    images[category, image].append(right)
  scores = collections.defaultdict(list)
  for (category, image), found in images.items():
    if len(found) != 2:
      raise UserError(
        f"mme_scores: image {image!r} of {category!r} has {len(found)} answers,"
        " expected two: accuracy+ needs pairs."
      )
    # Accuracy counts each answer, accuracy+ images with both right.
    scores[category].append(100 * (sum(found) / 2 + all(found)))
  means = {name: sum(found) / len(found) for name, found in scores.items()}
  return MME(
    means,
    sum(means.get(name, 0.0) for name in PERCEPTION),
    sum(means.get(name, 0.0) for name in COGNITION),
  )
