r"""Whether an answer is the right one, and under which form it votes.

A grader has `equal(truth, answer)` and `canonical(answer)`. `judge` puts an
extractor before a grader, so that a grader only ever sees one answer: graders
that search a text themselves accept "3 or 4" for 3.
"""

import dataclasses
import re
from typing import Protocol, runtime_checkable

from research.reasoning import expressions, normalization
from research.reasoning.extraction import Extractor
from research.reasoning.isolation import Failed, TimedOut, shared
from research.reasoning.problem import Verdict

_SYMBOLIC = "research.reasoning.symbolic"
_APPROXIMATE = re.compile(r"\\approx|\\sim(?:eq)?(?![a-z])|≈")


@runtime_checkable
class Grader(Protocol):
  """Compares one answer with the truth."""

  def equal(self, truth: str, answer: str) -> bool:
    """Whether a given answer is right; the order of the two matters.

    Raises:
      TimedOut, Failed: it cannot be decided.
    """
    ...

  def canonical(self, answer: str) -> str:
    """Returns the form under which equal answers are counted together."""
    ...


@dataclasses.dataclass(frozen=True)
class ExactMatch:
  """Equal texts, after lm-evaluation-harness' metric `exact_match`.

  Attributes:
    ignore: patterns that are removed from both, in turn; those of gsm8k.
  """

  ignore: tuple[str, ...] = (",", r"\$", r"(?s).*#### ", r"\.$")

  def equal(self, truth: str, answer: str) -> bool:
    """Whether the texts are equal but for what is ignored, and for case."""
    return self.canonical(truth) == self.canonical(answer)

  def canonical(self, answer: str) -> str:
    """Returns the text without what is ignored, in lower case."""
    for pattern in self.ignore:
      answer = re.sub(pattern, "", answer)
    return answer.lower()


@dataclasses.dataclass(frozen=True)
class Ladder:
  """The conservative grader of PRM800K, as an equivalence.

  Answers are normalised (`normalization.normalize`), and equal if they have one
  form (`normalization.canonical`), which is also what votes are counted by.
  """

  def equal(self, truth: str, answer: str) -> bool:
    form = self.canonical(answer)
    return bool(form) and form == self.canonical(truth)

  def canonical(self, answer: str) -> str:
    return normalization.canonical(normalization.normalize(answer))


@dataclasses.dataclass(frozen=True)
class MathVerify:
  """What Hugging Face's math-verify reads in one answer, compared by value.

  More lenient than `Ladder`: 10% is 0.1, 2/4 is 1/2 and 3+4=7 is 7. An equation
  whose sides differ is no answer, nor is an approximation. `verify` itself is
  no equivalence, so votes could not be counted by it.

  Attributes:
    seconds: for an answer that is no number, after the process has started.
  """

  seconds: float | int = 5.0

  def equal(self, truth: str, answer: str) -> bool:
    """Whether both have one form.

    Raises:
      TimedOut, Failed: math-verify does not say what one of them is.
    """
    return self._form(answer) == self._form(truth)

  def canonical(self, answer: str) -> str:
    """Returns the form that equal answers share; of a timeout, `Ladder`'s."""
    try:
      return self._form(answer)
    except (TimedOut, Failed):
      return Ladder().canonical(answer)

  def _form(self, answer: str) -> str:
    if _APPROXIMATE.search(answer):
      return answer.strip()
    form = Ladder().canonical(answer)
    if normalization.has_word(form):
      return form
    sides = [Ladder().canonical(x) for x in answer.split("=")]
    numbers = list(map(expressions.rational, sides))
    number = expressions.rational(form)
    if number is None and len(set(numbers)) == 1:
      number = numbers[0]  # 3+4=7
    if number is not None:
      return str(number / 100 if "%" in answer else number)
    worker = shared(_SYMBOLIC, self.seconds)
    return worker.call("math_verify_form", answer) or form


def judge(
  text: str | None, truth: str | None, extract: Extractor, grader: Grader
) -> Verdict:
  """Returns the verdict on a text.

  Args:
    text: the model's; None for none.
    truth: the reference answer; None if there is none, and then nothing is
      right.
    grader: compares it with the truth.
  """
  answer = None if text is None else extract(text)
  if answer is None:
    return Verdict(False, reason="no answer")
  canonical = grader.canonical(answer)
  try:
    correct = truth is not None and grader.equal(truth, answer)
  except TimedOut as error:
    return Verdict(False, answer, canonical, f"timeout: {error}")
  except Failed as error:
    return Verdict(False, answer, canonical, f"error: {error}")
  reason = "correct" if correct else "wrong"
  return Verdict(correct, answer, canonical, reason)
