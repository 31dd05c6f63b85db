"""How often a verifier errs, on answers of which the truth is known.

  python -m research.reasoning.rates

measures the graders on `answer_pairs.json`: ways to write an answer, and others
that are near. A test compares its pairs with math-verify.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from research.reasoning.grading import ExactMatch, Grader, Ladder, MathVerify
from research.reasoning.problem import Problem, Verdict


@runtime_checkable
class GraderTestTask(Protocol):
  """A task that can say right, wrong and undecided texts itself."""

  def verify(self, problem: Problem, text: str | None) -> Verdict: ...

  def oracle(self, problem: Problem) -> str: ...

  def mutated(self, problem: Problem) -> str: ...

  def hedges(self, problem: Problem) -> list[str]: ...


@dataclasses.dataclass(frozen=True)
class Rates:
  """Shares of problems on which a verifier errs.

  Attributes:
    problems: how many there were.
    false_negative: the oracle's text was rejected.
    false_positive: the oracle's text with another answer was accepted.
    hedge: texts with the right and a wrong answer were accepted.
  """

  problems: int
  false_negative: float
  false_positive: float
  hedge: float

  def __str__(self) -> str:
    return (
      f"{self.false_negative:.1%} of {self.problems} right answers rejected,"
      f" {self.false_positive:.1%} of wrong ones and {self.hedge:.1%} of hedges"
      " accepted"
    )


def measure(
  task: GraderTestTask, problems: Sequence[Problem], verifier=None
) -> Rates:
  """Returns how often a verifier errs on a task's problems.

  Args:
    problems: problems of the task; at least one.
    verifier: judges them; None for the task itself.
  """
  verify = (verifier or task).verify

  def accepted(texts: Callable[[Problem], Sequence[str]]) -> float:
    verdicts = [verify(x, text) for x in problems for text in texts(x)]
    return sum(x.correct for x in verdicts) / len(verdicts)

  return Rates(
    len(problems),
    1 - accepted(lambda x: [task.oracle(x)]),
    accepted(lambda x: [task.mutated(x)]),
    accepted(task.hedges),
  )


PAIRS = pathlib.Path(__file__).with_name("answer_pairs.json")


def pairs() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
  """Returns ordered pairs (truth, given) of equal, and of different answers."""
  groups = json.loads(PAIRS.read_text("utf-8"))
  equal = [x for g in groups for x in itertools.permutations(g["equal"], 2)]
  different = [
    x for g in groups for x in itertools.product(g["equal"], g["others"])
  ]
  return equal, different


def grader_rates(grader: Grader) -> tuple[float, float]:
  """Returns shares of equal pairs rejected, and of different ones accepted."""
  equal, different = pairs()
  rejected = [not grader.equal(*x) for x in equal]
  accepted = [grader.equal(*x) for x in different]
  return sum(rejected) / len(rejected), sum(accepted) / len(accepted)


def main() -> None:
  """Prints the graders' rates."""
  equal, different = pairs()
  print(f"{len(equal)} equal pairs, {len(different)} different ones")
  for grader in (ExactMatch(), Ladder(), MathVerify(seconds=60)):
    rejected, accepted = grader_rates(grader)
    print(
      f"{type(grader).__name__}: {rejected:.1%} of equal pairs rejected,"
      f" {accepted:.1%} of different ones accepted"
    )


if __name__ == "__main__":
  main()
