"""What strategies and verifiers of a configuration are made with."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from research.generation.stepwise import Stepwise
from research.reasoning.problem import Problem
from research.reasoning.problem import Verifier as Judge
from research.reasoning.prompting import Prompting
from research.reasoning.tasks.task import Task
from research.search.diffusion_policy import DiffusionPolicy
from research.search.engine import Path
from research.typing import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
  """A run's models and task, and the problems of a batch.

  Attributes:
    prompt_room: tokens that prompts are padded for at least.
    params: its weights as they were loaded, before `generate.prepare`.
    tokenizer: the models' shared tokenizer.
    prompting: what the policy reads of a question.
    task: source and verifier of the problems.
    problems: the batch's problems, by `Path.problem`.
    prompts: some of the run's, which show what stands beside their tokens.
    questions: texts of these prompts' problems.
  """

  policy: Stepwise | DiffusionPolicy
  prompt_room: int = 1
  params: Params
  tokenizer: Any
  prompting: Prompting
  task: Task
  judge: Judge
  problems: tuple[Problem, ...] = ()
  prompts: tuple[Sequence[int], ...] = ()
  questions: tuple[str, ...] = ()

  @property
  def vocab_size(self) -> int:
    if isinstance(self.policy, DiffusionPolicy):
      return self.policy.denoiser.model.vocab_size
    return self.policy.model.vocab_size

  def text(self, path: Path) -> str:
    return path.text(self.tokenizer.decode)

  def answer(self, path: Path) -> str | None:
    """Returns a path's answer in canonical form, or None."""
    problem = self.problems[path.problem]
    canonical = self.judge.verify(problem, self.text(path)).canonical
    return canonical if canonical and canonical.strip() else None
