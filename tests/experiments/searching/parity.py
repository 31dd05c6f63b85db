"""A task that untrained models solve now and then: to write an even number."""

import dataclasses
import itertools
import re
import time
from typing import ClassVar

from experiments.searching import free_verifiers
from research.reasoning.problem import Problem, Verdict
from research.reasoning.tasks.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity(Task):
  """The last number of a text is the answer, right where it is even."""

  NAME: ClassVar[str] = "parity"

  broken: bool = False
  slow: float | int = 0.0

  def problem(self, index):
    prompt = f"{index % 19} + {index % 7} ="
    return Problem(id=f"parity/{index}", prompt=prompt)

  def verify(self, problem, text):
    if self.broken:
      raise RuntimeError("broken")
    time.sleep(self.slow)
    found = re.findall(r"\d+", text or "")
    if not found:
      return Verdict(False, reason="no answer")
    right = int(found[-1]) % 2 == 0
    return Verdict(right, found[-1], found[-1], "correct" if right else "wrong")


HANGS_AFTER = [None]
"""Number of scores after which `Hangs` hangs; None for never."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hangs(free_verifiers.RandomScores):
  """A verifier that answers so many times."""

  def load(self, context):
    calls = itertools.count()

    def score(path):
      if HANGS_AFTER[0] is not None and next(calls) >= HANGS_AFTER[0]:
        time.sleep(20)
      return 0.5

    return free_verifiers.Stateless(score)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diverged(free_verifiers.RandomScores):
  """A verifier whose scores are no numbers."""

  def load(self, context):
    return free_verifiers.Stateless(lambda path: float("nan"))
