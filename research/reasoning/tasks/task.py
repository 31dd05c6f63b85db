"""A task: a sequence of problems, and the verifier that judges answers to them.

Problem i depends on the task's fields and i alone, so workers of a pipeline
read any part of it. A task is a frozen dataclass: experiments print it, and
`isolation.Isolated` makes it again in another process.
"""

import abc
import dataclasses
import random
import re
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, NamedTuple, get_args, overload

from research.data.sources import Split, split_of
from research.errors import UserError
from research.ranges import Between, OneOf, Ranged
from research.reasoning.problem import Problem, Verdict
from research.reasoning.words import EOS

DRAWS = 1000
"""How often a problem of a split is drawn before that is an error."""

_INTEGER = re.compile(r"\d+(?!.*\d)", re.DOTALL)


class SolvedProblems(NamedTuple):
  """Problems of words with solutions, drawn all at once.

  Attributes:
    words: each of them a token.
    rows: indices of words, int32 `[P, W]`: a prompt, a solution and its end.
    prompt: words of a prompt.
  """

  words: tuple[str, ...]
  rows: Any
  prompt: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Ranged, Sequence[Problem], abc.ABC):
  """Problems of one kind.

  Attributes:
    count: number of problems.
    split: which of them; no problem is in two splits.
    seed: random seed of generated problems.
  """

  NAME: ClassVar[str]

  count: Between(0, 1 << 31) = 1000
  split: OneOf(*get_args(Split)) = "train"
  seed: Between(0, 1 << 31) = 0

  @abc.abstractmethod
  def problem(self, index: int) -> Problem:
    """Returns the problem of an index from 0 on."""

  @abc.abstractmethod
  def verify(self, problem: Problem, text: str | None) -> Verdict:
    """Returns the verdict on a model's text."""

  def require_answers(self) -> None:
    """Raises UserError where `verify` has nothing to compare texts with."""

  def present(self, answer: str) -> str:
    """Returns an answer as a text in which `verify` finds it."""
    return answer

  def oracle(self, problem: Problem) -> str:
    """Returns a text that `verify` accepts.

    Raises:
      UserError: none is known.
    """
    if problem.answer is None:
      raise UserError(f"{problem.id}: has no reference answer.")
    return self.present(problem.answer)

  def mutated(self, problem: Problem) -> str:
    """Returns the oracle's text with another answer, which is wrong."""
    return self.present(mutate(problem.answer or ""))

  def hedges(self, problem: Problem) -> list[str]:
    """Returns texts that give the right answer and a wrong one.

    Both in one place and in two, and in either order. Where the last place
    counts, as for boxes, one of the four is right by convention.
    """
    right = problem.answer or ""
    wrong = mutate(right)
    places = self.present(right), self.present(wrong)
    return [
      self.present(f"{right} or {wrong}"),
      self.present(f"{wrong} or {right}"),
      " or ".join(places),
      " or ".join(places[::-1]),
    ]

  def __len__(self) -> int:
    return self.count

  @overload
  def __getitem__(self, index: int) -> Problem: ...
  @overload
  def __getitem__(self, index: slice) -> list[Problem]: ...

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(self.count))]
    return self.problem(range(self.count)[index])  # or IndexError

  def range_of(
    self, problems: tuple[int, int] | None, field: str
  ) -> tuple[int, int]:
    """Returns the first and last index of a range, the last one not included.

    Args:
      problems: the two indices; None for all problems.
      field: whose value they are, such as "SearchRun.problems".

    Raises:
      UserError: the range is empty, or not within the task.
    """
    first, last = (0, len(self)) if problems is None else problems
    if not 0 <= first < last <= len(self):
      raise UserError(
        f"{field}: found {first} to {last}, expected a range within the"
        f" {len(self)} problems of {type(self).__name__}; raise its count."
      )
    return first, last

  def distinct(
    self, count: int, excluding: Collection[str] = ()
  ) -> list[Problem]:
    """Returns the first problems that differ in what they ask.

    Args:
      excluding: prompts, such as those of training, that none may have.

    Raises:
      UserError: the task has fewer.
    """
    problems: dict[str, Problem] = {}
    for problem in self:
      if len(problems) == count:
        break
      if problem.prompt not in excluding:
        problems.setdefault(problem.prompt, problem)
    if len(problems) < count:
      raise UserError(
        f"{type(self).__name__}: found {len(problems)} different problems among"
        f" {self.count}, expected {count}; raise the task's count."
      )
    return list(problems.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedTask(Task):
  """A task whose problems are drawn; the hash of a problem's key is its split.

  So no problem is in two splits, whatever their seeds.
  """

  @abc.abstractmethod
  def draw(self, rng: random.Random) -> Problem | None:
    """Returns a problem, or None where the draw broke a rule."""

  def key(self, problem: Problem) -> str:
    """Returns what decides the split: equal for problems that are the same."""
    return problem.id

  def problem(self, index: int) -> Problem:
    """Returns the problem of an index from 0 on.

    Raises:
      UserError: there is hardly any such problem in this split.
    """
    # A string seeds by SHA-512, so neighbouring seeds share no problems.
    rng = random.Random(f"{self.NAME}/{self.split}/{self.seed}/{index}")
    for _ in range(DRAWS):
      drawn = self.draw(rng)
      if drawn is not None and split_of(self.key(drawn)) == self.split:
        return drawn
    raise UserError(
      f"{type(self).__name__}: found no problem of split {self.split!r} in"
      f" {DRAWS} draws: the settings admit too few."
    )


def answer_of(text: str | None) -> str:
  """Returns a text without the end that a model of words writes."""
  return (text or "").strip().removesuffix(EOS).rstrip()


def mutate(answer: str) -> str:
  """Returns another answer: its last integer plus one, or its text reversed."""
  match = _INTEGER.search(answer)
  if match:
    number = str(int(match.group()) + 1)
    return answer[: match.start()] + number + answer[match.end() :]
  return answer[::-1] if answer != answer[::-1] else answer + "x"
