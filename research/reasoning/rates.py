"""How often a verifier errs, on answers of which the truth is known."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

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
    hedge: of the texts with the right and a wrong answer, those accepted.
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
    task: makes the texts.
    problems: of the task; at least one.
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
