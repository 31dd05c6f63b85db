r"""Whether an answer is the right one, and under which form it votes.

A grader has `equal(truth, given)` and `canonical(given)`. `judge` puts an
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
_WORDS = re.compile(r"sqrt|log|ln|sin|cos|tan|pi|inf")
_LARGE = re.compile(r"\^\(|\^\d+\^|\^-?\d\d+")
_NAMED = re.compile(r"\s*\\?[A-Za-z]\w*(?:\([a-z]\))?\s*=[^=]*")


@runtime_checkable
class Grader(Protocol):
  """Compares one answer with the truth."""

  def equal(self, truth: str, given: str) -> bool:
    """Whether a given answer is right; the order of the two matters.

    Raises:
      TimedOut, Failed: it cannot be decided.
    """
    ...

  def canonical(self, given: str) -> str:
    """Returns the form under which equal answers are counted together."""
    ...


@dataclasses.dataclass(frozen=True)
class ExactMatch:
  """Equal texts, after lm-evaluation-harness' metric `exact_match`.

  Attributes:
    ignore: patterns that are removed from both, in turn; those of gsm8k.
  """

  ignore: tuple[str, ...] = (",", r"\$", r"(?s).*#### ", r"\.$")

  def equal(self, truth: str, given: str) -> bool:
    """Whether the texts are equal but for what is ignored, and for case."""
    return self.canonical(truth) == self.canonical(given)

  def canonical(self, given: str) -> str:
    """Returns the text without what is ignored, in lower case."""
    for pattern in self.ignore:
      given = re.sub(pattern, "", given)
    return given.lower()


@dataclasses.dataclass(frozen=True)
class Ladder:
  """The conservative grader of PRM800K, without evaluating anything.

  Both answers are normalised (`normalization.normalize`). Equal ones are right;
  so are tuples whose brackets and elements are. An integer must be given as
  one, a fraction as the same fraction; other constants are compared exactly.

  Attributes:
    symbolic_seconds: for sympy to simplify the difference of what remains; 0
      for none, and then what remains is wrong.
  """

  symbolic_seconds: float | int = 0.0

  def equal(self, truth: str, given: str) -> bool:
    """Whether the given answer is the truth, element by element."""
    a, b = (normalization.normalize(x) for x in (truth, given))
    if a == b or not b:
      return bool(b)
    (around, expected), (found, elements) = map(normalization.elements, (a, b))
    return (
      around == found
      and len(expected) == len(elements)
      and all(map(self._same, expected, elements))
    )

  def _same(self, truth: str, given: str) -> bool:
    if truth == given:
      return True
    if normalization.is_fraction(truth) and normalization.is_fraction(given):
      return False
    if normalization.is_integer(truth) or normalization.is_integer(given):
      return False
    exact = [expressions.rational(x) for x in (truth, given)]
    if None not in exact:
      return exact[0] == exact[1]
    if not self.symbolic_seconds or not may_simplify(truth, given):
      return False
    worker = shared(_SYMBOLIC, self.symbolic_seconds)
    return worker.call("sympy_equal", truth, given)

  def canonical(self, given: str) -> str:
    """Returns the normalised answer; sympy's form where it may simplify."""
    found = normalization.canonical(normalization.normalize(given))
    plain = expressions.rational(found) is not None
    if plain or not self.symbolic_seconds or not may_simplify(found):
      return found
    try:
      worker = shared(_SYMBOLIC, self.symbolic_seconds)
      return worker.call("sympy_canonical", found)
    except (TimedOut, Failed):
      return found


@dataclasses.dataclass(frozen=True)
class MathVerify:
  """Hugging Face's math-verify, given one answer and a time limit.

  It is more lenient than `Ladder`: 10% is 0.1, 2/4 is 1/2. Of an equation it
  takes the right side, which is an answer only if the left one is a name.

  Attributes:
    seconds: for a pair, after the process has started.
  """

  seconds: float | int = 5.0

  def equal(self, truth: str, given: str) -> bool:
    """Whether math-verify accepts `given` for `truth`."""
    # It takes what is right of the sign: 4 = 3 would be a 3.
    if "=" in given and "=" not in truth and not _NAMED.fullmatch(given):
      return False
    worker = shared(_SYMBOLIC, self.seconds)
    return worker.call("math_verify_equal", truth, given)

  def canonical(self, given: str) -> str:
    """Returns the form of `Ladder`, with sympy; of a number, its value.

    10% keeps its sign, since it is right for 0.1, for which 10 is wrong. A
    number that math-verify does not read as the ladder does stays as it is.
    """
    found = Ladder(self.seconds).canonical(given)
    value = expressions.rational(found)
    if value is None:
      return found
    try:
      worker = shared(_SYMBOLIC, self.seconds)
      return worker.call("math_verify_number", str(value), given)
    except (TimedOut, Failed):
      return found


def may_simplify(*parts: str) -> bool:
  """Whether sympy may be asked to simplify normalised expressions together.

  Not with more than two unknown letters, and not with powers on which it is
  known to hang: PRM800K's rules.
  """
  text = " ".join(parts)
  letters = {x for x in _WORDS.sub("", text) if x.isalpha()}
  return (
    len(letters) <= 2
    and not _LARGE.search(text)
    and all(map(expressions.is_expression, parts))
  )


def judge(
  text: str | None, truth: str | None, extract: Extractor, grader: Grader
) -> Verdict:
  """Returns the verdict on a text.

  Args:
    text: the model's; None for none.
    truth: the reference answer; None if there is none, and then nothing is
      right.
    extract: finds the one answer in the text.
    grader: compares it with the truth.
  """
  found = None if text is None else extract(text)
  if found is None:
    return Verdict(False, reason="no answer")
  canonical = grader.canonical(found)
  try:
    correct = truth is not None and grader.equal(truth, found)
  except TimedOut as error:
    return Verdict(False, found, canonical, f"timeout: {error}")
  except Failed as error:
    return Verdict(False, found, canonical, f"error: {error}")
  reason = "correct" if correct else "wrong"
  return Verdict(correct, found, canonical, reason)
