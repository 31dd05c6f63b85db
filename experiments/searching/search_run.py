"""The root of a search's configuration: problems, a policy, a way to search.

What decides on the samples is apart from what is made of them: `choice` and
`n` choose again from a pool that is there, without sampling.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from experiments.core.experiment import Source
from experiments.searching.prompts import Plain
from experiments.searching.step_ends import AtEnd, StepEnds
from experiments.searching.strategies import AllocatedSamples, SearchStrategy
from experiments.searching.verifiers import VerifierSource
from research.diffusion.sampling.config import SamplerConfig
from research.generation.sampling import Sampling
from research.generation.sampling import check as check_sampling
from research.ranges import NonNegativeInt, PositiveInt, Ranged
from research.reasoning import isolation
from research.reasoning.isolation import Guarded
from research.reasoning.prompting import Prompting
from research.reasoning.tasks.task import Task
from research.search.choose import Choice, Majority
from research.search.step_search import needs_scores
from research.typing import UserError

SAMPLED = Sampling(temperature=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchRun(Ranged):
  """A search over problems of a task.

  Attributes:
    task: the problems, and who judges answers; its split should be held out.
    policy: where the model that writes solutions comes from.
    strategy: the search, of `research.search.strategies`, or one of
      `searching.strategies`.
    problems: first and last index, the last one not included, among the task's
      problems with different ids; None for all.
    verifier: where scores of steps come from; None for no scores.
    lookahead: steps that a greedy rollout goes on before a step is scored.
    steps: where a step of a solution ends.
    prompting: what the policy reads of a problem.
    sampling: how the policy's tokens are drawn.
    sampler: how a masked diffusion policy fills its blocks, which are the
      steps; None for a policy that writes token by token.
    new_tokens: most tokens of a solution; of whole blocks.
    most_steps: most steps of a solution.
    stop_tokens: ids that end a solution; None for the tokenizer's.
    batch: problems that are searched at once.
    seed: random seed of the sampling.
    judge: makes what judges texts of the task: `isolation.Guarded`, or
      `isolation.Isolated` for verifiers that may hang.
    judge_timeout: seconds that a verdict on a text may take; None for the
      judge's default. What takes longer is wrong.
    timeout: seconds that the verifier has for the steps of a batch; None for
      any number. One that takes longer ends the search, which goes on later
      behind the batches that are done: without scores there is no choice.
    choice: which of a problem's answers is given.
    n: samples to choose among, every subset of so many; None for all.
  """

  task: Task
  policy: Source
  strategy: SearchStrategy
  problems: tuple[int, int] | None = (0, 100)
  verifier: VerifierSource | None = None
  lookahead: NonNegativeInt = 0
  steps: StepEnds = AtEnd()
  prompting: Prompting = Plain()
  sampling: Sampling = SAMPLED
  sampler: SamplerConfig | None = None
  new_tokens: PositiveInt = 64
  most_steps: PositiveInt = 64
  stop_tokens: tuple[int, ...] | None = None
  batch: PositiveInt = 8
  seed: int = 0
  judge: Callable[[Any], Any] = Guarded
  judge_timeout: float | int | None = None
  timeout: float | int | None = None
  choice: Choice = Majority()
  n: PositiveInt | None = None

  def __post_init__(self):
    super().__post_init__()
    check_sampling(self.sampling)
    self.task.require_answers()
    first, last = self.task.range_of(self.problems, "SearchRun.problems")
    object.__setattr__(self, "problems", (first, last))
    if isinstance(self.strategy, AllocatedSamples) and (
      first % self.batch or last % self.batch
    ):
      raise UserError(
        f"SearchRun.problems: found {first} to {last} in batches of"
        f" {self.batch}, expected multiples of it: a batch shares one budget of"
        " samples, the same in every range of problems."
      )
    if self.lookahead and self.verifier is None:
      raise UserError(
        f"SearchRun.lookahead: found {self.lookahead} and no verifier, expected"
        " 0 or a verifier."
      )
    for name in ("strategy", "choice"):
      part = getattr(self, name)
      if self.verifier is None and needs_scores(part):
        raise UserError(
          f"SearchRun.verifier: found None and the {name}"
          f" {type(part).__name__}, which goes by scores of steps, expected a"
          " verifier, such as --set=VERIFIER=@verifiers.TrainedReward(), or"
          f" another {name.upper()}."
        )
    if self.sampler is not None and not self.sampler.stop_early:
      raise UserError(
        f"SearchRun.sampler: found {self.sampler.show('stop_early')}, expected"
        " True: a solution that does not stop at its end is truncated, and"
        " has no answer."
      )

  def settings(self) -> dict[str, Any]:
    """Returns what decides on the samples of a problem, as plain values."""
    values = isolation.describe(self)["fields"]
    if self.sampler is None:
      del values["sampler"]  # as pools have it that are older than this field
    return {name: x for name, x in values.items() if name not in CHOSEN_AFTER}


CHOSEN_AFTER = ("problems", "choice", "n")
"""Fields of a run that may change while a pool grows, or when it is there."""
