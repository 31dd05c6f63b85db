"""Chains of sums, one step an addition, with exact oracles.

A prompt is `12 + 47 - 30 =`. A step carries the running total on: `12 + 47 = 59
;`, then `59 - 30 = 29 ;`. reasoning-gym's `chain_sum` asks for the same sums
(Stojanovski et al. 2025, arXiv:2505.24760).

Which steps are right is determined, and an error is never made good: labels by
rollouts are the labels of the oracle here, unlike in countdown. The last number
is the answer, so votes can be counted.
"""

import dataclasses
import random
import re
from collections.abc import Sequence
from typing import ClassVar

from research.errors import UserError
from research.ranges import Between
from research.reasoning.problem import Problem, StepVerdict, Verdict
from research.reasoning.tasks.task import GeneratedTask, answer_of, mutate
from research.reasoning.words import EOS, PAD

_STEP = re.compile(r"(-?\d{1,18}) ([-+]) (\d{1,18}) = (-?\d{1,18}) ;")
_LAST = re.compile(r"= (-?\d{1,18}) ;$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain(GeneratedTask):
  """Sums with running totals.

  Attributes:
    terms: how many numbers there are, least and most.
    digits: number of digits of each of them.
    operators: those used, out of `+` and `-`.
    totals: least and largest running total; None for any.
  """

  NAME: ClassVar[str] = "chain"

  terms: tuple[int, int] = (8, 8)
  digits: Between(1, 9) = 2
  operators: str = "+-"
  totals: tuple[int, int] | None = None

  def __post_init__(self):
    super().__post_init__()
    low, high = self.terms
    if not 2 <= low <= high <= 100:
      raise UserError(
        f"Chain.terms: found {low} to {high}, expected a range within 2 to 100."
      )
    if not self.operators or set(self.operators) - set("+-"):
      raise UserError(
        f"Chain.operators: found {self.operators!r}, expected some of '+-'."
      )

  def draw(self, rng: random.Random) -> Problem | None:
    """Returns a sum; None where a total leaves the range."""
    low = 10 ** (self.digits - 1) if self.digits > 1 else 0
    high = 10**self.digits - 1
    terms = rng.randint(*self.terms)
    words = [str(rng.randint(low, high))]
    for _ in range(terms - 1):
      words += [rng.choice(self.operators), str(rng.randint(low, high))]
    totals = _totals(words)
    if self.totals is not None:
      least, most = self.totals
      if not all(least <= x <= most for x in totals):
        return None
    text = " ".join(words)
    return Problem(
      id=f"{self.NAME}/{text}",
      prompt=f"{text} =",
      answer=str(totals[-1]),
      difficulty=float(terms),
    )

  def oracle(self, problem: Problem) -> str:
    return " ".join(self.solution(problem))

  def solution(self, problem: Problem) -> list[str]:
    """Returns the only right steps."""
    words = _words(problem)
    totals = _totals(words)
    return [
      f"{a} {sign} {term} = {total} ;"
      for a, sign, term, total in zip(
        totals, words[1::2], words[2::2], totals[1:], strict=False
      )
    ]

  def mutated(self, problem: Problem) -> str:
    """Returns the solution with another last number."""
    return mutate(self.oracle(problem))

  def hedges(self, problem: Problem) -> list[str]:
    """Returns solutions that end with two totals, and pairs of solutions."""
    both = self.oracle(problem), self.mutated(problem)
    ends = [x.removesuffix(" ;").rpartition(" ")[2] for x in both]
    right, wrong = (x.removesuffix(" ;") for x in both)
    return [
      f"{right} or {ends[1]} ;",
      f"{wrong} or {ends[0]} ;",
      " or ".join(both),
      " or ".join(both[::-1]),
    ]

  def verify(self, problem: Problem, text: str | None) -> Verdict:
    """Returns whether the last step's total is the sum."""
    match = _LAST.search(answer_of(text))
    if not match:
      return Verdict(False, reason="no answer")
    total = str(int(match[1]))
    correct = total == problem.answer
    return Verdict(correct, match[1], total, "correct" if correct else "wrong")

  def verify_step(
    self, problem: Problem, steps: Sequence[str], step: str
  ) -> StepVerdict:
    """Returns "ok" if this step and all before it are those of the solution."""
    solution = self.solution(problem)
    for before, right in zip(steps, solution, strict=False):
      if before.strip() != right:
        return StepVerdict("error", "an earlier step is wrong")
    if len(steps) >= len(solution):
      return StepVerdict("error", "the sum is complete")
    right, step = solution[len(steps)], step.strip()
    if step == right:
      return StepVerdict("ok")
    if not _STEP.fullmatch(step):
      return StepVerdict("error", f"found {step!r:.60}, not a step")
    return StepVerdict("error", f"expected {right!r}")


def vocabulary(least: int, most: int) -> tuple[str, ...]:
  """Returns a model's words, for totals and terms of a range."""
  return (*map(str, range(least, most + 1)), *"+-=;", EOS, PAD)


def _words(problem: Problem) -> list[str]:
  match = re.fullmatch(r"(\d+(?: [-+] \d+)+) =", problem.prompt)
  if not match:
    raise UserError(
      f"chain: found the prompt {problem.prompt!r:.60}, expected one such as"
      " '12 + 47 - 30 ='."
    )
  return match[1].split()


def _totals(words: Sequence[str]) -> list[int]:
  totals = [int(words[0])]
  for sign, term in zip(words[1::2], words[2::2], strict=True):
    totals.append(totals[-1] + (int(term) if sign == "+" else -int(term)))
  return totals
