"""Scores of one answer, from 0 to 1."""

from collections.abc import Callable, Sequence

from research.typing import UserError
from research.vlm.evaluation.answers import evalai_normalize

Score = Callable[[str, str], float]
"""(prediction, answer) -> 0 to 1."""

_ENOUGH = 3
"""People who gave an answer that counts in full."""


def exact_match(prediction: str, answer: str) -> float:
  """Returns 1 where both are the same, but for case and space around them."""
  return float(prediction.strip().lower() == answer.strip().lower())


def vqa_accuracy(
  prediction: str,
  answers: Sequence[str],
  normalize: Callable[[str], str] = evalai_normalize,
) -> float:
  """Returns VQA accuracy against people's answers, usually ten.

  The mean over all sets that leave one person out of min(1, matches / 3)
  (Antol et al. 2015, section 4): three of ten who agree are 0.9, two are 0.6.
  Of fewer than four people nothing is 1: two who agree are 1/3, three 2/3.

  Args:
    answers: one a person, of two at least.
    normalize: of both; `vqa_normalize` for VQA v2, `str` for none.

  Raises:
    UserError: there are fewer than two answers: leaving one out leaves none, so
      that all predictions are 0.
  """
  if len(answers) < 2:
    raise UserError(
      f"vqa_accuracy: found {len(answers)} answers, expected those of several"
      " people, usually ten; for one right answer use exact_match."
    )
  prediction = normalize(prediction)
  agrees = [normalize(x) == prediction for x in answers]
  matches = sum(agrees)
  return sum(min(1.0, (matches - x) / _ENOUGH) for x in agrees) / len(agrees)


def levenshtein(one: str, two: str) -> int:
  """Returns the least number of insertions, deletions and replacements."""
  if len(one) < len(two):
    one, two = two, one
  row = list(range(len(two) + 1))
  for i, a in enumerate(one, 1):
    diagonal, row[0] = row[0], i
    for j, b in enumerate(two, 1):
      changed = diagonal + (a != b)
      diagonal, row[j] = row[j], min(changed, row[j] + 1, row[j - 1] + 1)
  return row[-1]


def anls(
  prediction: str, answers: Sequence[str], threshold: float = 0.5
) -> float:
  """Returns the normalised Levenshtein similarity to the nearest answer.

  Biten et al. 2019, "Scene Text Visual Question Answering", equation 1: 1 minus
  the distance over the longer length; 0 below the threshold. Case and runs of
  space do not count in the distance, but space does in the length, as in
  DocVQA's evaluation.

  Args:
    answers: any of them is right.
    threshold: least similarity that counts.

  Raises:
    UserError: there are no answers.
  """
  if not answers:
    raise UserError("anls: found no answers, expected one at least.")
  best = 0.0
  for answer in answers:
    one, two = (" ".join(x.lower().split()) for x in (prediction, answer))
    length = max(len(prediction), len(answer))
    distance = levenshtein(one, two) / length if length else 0.0
    best = max(best, 1 - distance)
  return best if best >= threshold else 0.0


def _number(text: str) -> float | None:
  try:
    if text.endswith("%"):
      return float(text.rstrip("%")) / 100
    return float(text)
  except ValueError:
    return None


def relaxed_accuracy(
  prediction: str, answer: str, tolerance: float = 0.05
) -> float:
  """Returns 1 where a number is within 5% of the answer, or texts are equal.

  ChartQA (Masry et al. 2022, section 5.1). "12%" is 0.12. A number beside 0 has
  no relative error, so both are compared as texts, but for case.
  """
  found, expected = _number(prediction), _number(answer)
  if found is not None and expected:
    return float(abs(found - expected) / abs(expected) <= tolerance)
  return float(prediction.lower() == answer.lower())
