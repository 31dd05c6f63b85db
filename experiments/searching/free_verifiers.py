"""Verifiers that are not models, at no cost: what others are compared with."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from experiments.searching.context import Context
from research.generation.generated import NO_TOKEN
from research.ranges import Ranged, Share
from research.reasoning.problem import Problem, StepVerifier
from research.search.engine import Path, Verifier
from research.search.ledger import Ledger
from research.search.policy import steps_of
from research.typing import Float, Int, UserError


@runtime_checkable
class ReadsProblems(Protocol):
  """A verifier that has to know the problems of a batch."""

  def with_problems(self, problems: Sequence[Problem]) -> Verifier:
    """Returns the verifier of these problems, by `Path.problem`."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomScores:
  """Scores that are drawn: what any other has to beat.

  Attributes:
    seed: random seed; a path always has the same score.
  """

  seed: int = 0

  def load(self, context: Context) -> Verifier:
    del context
    return Stateless(lambda path: _uniform(self.seed, path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactSteps(Ranged):
  """The task's own oracle of steps, which errs as often as it is set to.

  Its score is 1 for a step that it accepts, else 0. Searches with it show what
  a better verifier would buy, and the plateau of one that errs
  (`estimators.noisy_best_of_n`).

  Attributes:
    right: chance that it accepts a right step, t.
    wrong: chance that it accepts a wrong one, f.
    seed: random seed of its errors; a path always has the same score.
  """

  right: Share = 1.0
  wrong: Share = 0.0
  seed: int = 0

  def load(self, context: Context) -> Verifier:
    """Returns the verifier.

    Raises:
      UserError: the task has no oracle of steps.
    """
    if not isinstance(context.task, StepVerifier):
      raise UserError(
        f"ExactSteps: {type(context.task).__name__} has no oracle of steps,"
        " expected a task such as Countdown or Chain."
      )
    return _Oracle(lambda path: 0.0, self, context)


@dataclasses.dataclass(frozen=True)
class Stateless:
  """A verifier that is a function of a path.

  Attributes:
    score: path -> score of its last step, from 0 to 1.
  """

  score: Callable[[Path], float]

  def prompt_cost(self, tokens: int) -> Ledger:
    del tokens
    return Ledger()

  def step_cost(self, start: int, tokens: int) -> Ledger:
    del start, tokens
    return Ledger()

  def start(
    self, prompts: Sequence[Sequence[int]], copies: int, max_new_tokens: int
  ) -> Any:
    del prompts, copies, max_new_tokens

  def read(
    self, state: Any, paths: Sequence[Path], new: Int[np.ndarray, "R C"]
  ) -> tuple[Any, Float[np.ndarray, " R"]]:
    fresh = (new != NO_TOKEN).any(axis=1)
    scores = [
      self.score(path) if is_new else 0.0
      for path, is_new in zip(paths, fresh, strict=True)
    ]
    return state, np.array(scores, float)

  def select(self, state: Any, rows: Sequence[int]) -> Any:
    del rows
    return state

  def store(self, state: Any, new: Any, rows: Sequence[int]) -> Any:
    del new, rows
    return state


@dataclasses.dataclass(frozen=True)
class _Oracle(Stateless):
  """See `ExactSteps`."""

  settings: ExactSteps
  context: Context

  def with_problems(self, problems: Sequence[Problem]) -> Verifier:
    def score(path: Path) -> float:
      steps = steps_of(path, self.context.tokenizer.decode)[1]
      words = [step.text for step in steps]
      if path.problem >= len(problems):
        raise UserError(
          f"ExactSteps: found the prompt {path.problem} of {len(problems)}"
          " problems, expected a search that asks each problem once a round;"
          " RoundsOfText asks `width` times, with earlier solutions."
        )
      problem = problems[path.problem]
      right = bool(words) and self._accepts(problem, words)
      share = self.settings.right if right else self.settings.wrong
      return float(_uniform(self.settings.seed, path, problem.id) < share)

    return dataclasses.replace(self, score=score)

  def _accepts(self, problem: Problem, steps: Sequence[str]) -> bool:
    *before, last = steps
    return self.context.task.verify_step(problem, before, last).label == "ok"


def _uniform(seed: int, path: Path, name: str = "") -> float:
  """Returns a number from 0 to 1 that a path always has."""
  text = f"{seed} {name} {path.problem} {path.root} {path.tokens}"
  digest = hashlib.sha256(text.encode()).digest()
  return int.from_bytes(digest[:6], "big") / 2**48
