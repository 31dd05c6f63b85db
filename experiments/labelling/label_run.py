"""The root of a configuration of labels: problems, a policy, kinds of label."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from experiments.core import cli
from experiments.core.experiment import Source
from experiments.generating import policies
from experiments.generating.diffusion import check_next_token
from research.data.sources import jsonl
from research.generation.sampling import Sampling
from research.generation.sampling import check as check_sampling
from research.prm import policy_samples
from research.prm.labelled import LabelledSolution
from research.ranges import NonNegativeInt, OneOf, PositiveInt, Ranged
from research.reasoning.isolation import Guarded, guard
from research.reasoning.problem import Problem, StepVerifier, Verdict
from research.reasoning.prompting import Prompting, as_text
from research.reasoning.segmentation import SEGMENTERS, Segmenter, steps_of
from research.reasoning.tasks.task import Task
from research.reasoning.trace import Trace
from research.typing import UserError

SAMPLED = Sampling(temperature=1.0)


class Labelled(NamedTuple):
  """What a run has made.

  Attributes:
    cut: solutions that were left out, as they had no end or no step.
  """

  solutions: list[LabelledSolution]
  cut: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelRun(Ranged):
  """Solutions of a task's problems, and labels of their steps.

  Tasks with an exact oracle of steps label all of them, until the first error.
  Others have the outcome's label where a solution is one step, of the segmenter
  "whole": data of an outcome model.

  Attributes:
    task: the problems, and who judges solutions.
    policy: where the model that writes solutions comes from, and that which
      completes their beginnings.
    segmenter: splits a solution into steps, a key of `SEGMENTERS`; those of a
      pool as well, whose search may have had other steps.
    problems: first and last index of the task's problems, the last one not
      included; None for all.
    copies: solutions of a problem.
    pool: `pool.jsonl` of `experiments.search`, whose solutions are labelled in
      place of new ones; None for new ones.
    excluding: problems whose questions are left out, as those that a search is
      judged by; None for none. Generators may ask the same in two splits.
    rollouts: completions of each step that are counted; 0 for none.
    new_tokens: of a solution, at most.
    sampling: of the policy's tokens.
    prompting: what the policy reads of a problem.
    rows: of a batch that is sampled.
    policy_id: name of the policy in the file.
    seed: of the sampling.
    judge: makes what judges texts and steps of the task: `isolation.Guarded`,
      or `isolation.Isolated` for verifiers that may hang.
    timeout: seconds that a verdict may take; None for the judge's default.
  """

  task: Task
  policy: Source
  segmenter: OneOf(*SEGMENTERS)
  problems: tuple[int, int] | None = (0, 1000)
  copies: PositiveInt = 4
  pool: str | None = None
  excluding: Task | None = None
  rollouts: NonNegativeInt = 0
  new_tokens: PositiveInt = 64
  sampling: Sampling = SAMPLED
  prompting: Prompting = as_text
  rows: PositiveInt = 1024
  policy_id: str = ""
  seed: int = 0
  judge: Callable[..., Any] = Guarded
  timeout: float | int | None = None

  def __post_init__(self):
    super().__post_init__()
    check_sampling(self.sampling)
    if self.pool is None or self.rollouts:
      self.task.require_answers()
    problems = self.task.range_of(self.problems, "LabelRun.problems")
    object.__setattr__(self, "problems", problems)
    exact = isinstance(self.task, StepVerifier)
    if not (exact or self.rollouts or self.segmenter == "whole"):
      raise UserError(
        f"LabelRun.rollouts: found 0, expected at least 1:"
        f" {type(self.task).__name__} has no oracle of steps. For labels of"
        ' outcomes alone, set segmenter to "whole".'
      )

  def run(self, say: Callable[[str], Any]) -> Labelled:
    keys = jax.random.split(jax.random.key(self.seed))
    unused = {x.prompt for x in self.excluding or ()}
    verifier = guard(self.judge, self.task, self.timeout)
    if self.pool is None:
      problems = self.task[slice(*self.problems)]
      problems = [x for x in problems if x.prompt not in unused]
      sampler = self._sampler(problems)
      found = policy_samples.sample_solutions(
        sampler,
        verifier,
        problems,
        self.copies,
        SEGMENTERS[self.segmenter],
        keys[0],
      )
      cut = len(problems) * self.copies - len(found)
    else:
      problems, found, asked = read_pool(self.pool, SEGMENTERS[self.segmenter])
      cut = asked - len(found)
      found = [x for x in found if x.prompt not in unused]
      sampler = self._sampler(problems) if self.rollouts else None
    say(f"{len(found):,} solutions of {len(problems):,} problems")
    found = [
      dataclasses.replace(
        one, policy_id=self.policy_id, segmenter_id=self.segmenter
      )
      for one in found
    ]
    if sampler is not None and self.rollouts:
      found = policy_samples.with_rollouts(
        *(found, sampler, verifier, problems, self.rollouts, keys[1])
      )
    if isinstance(self.task, StepVerifier):
      found = policy_samples.with_exact_labels(found, verifier, problems)
    elif self.segmenter == "whole":
      found = [
        one.relabelled((int(bool(one.final_correct)),), "exact_value")
        for one in found
      ]
    for kind, times in getattr(verifier, "failures", {}).items():
      say(f"{times:,} texts or steps not judged: {kind}")
    return Labelled(found, cut)

  def _sampler(
    self, problems: Sequence[Problem]
  ) -> policy_samples.PolicySampler:
    cli.loading(self.policy)
    loaded = self.policy.load()
    check_next_token(loaded, "LabelRun.policy")
    if loaded.tokenizer is None or not loaded.tokenizer.stop:
      raise UserError(
        "LabelRun.policy: found no tokenizer with a token that ends a text,"
        " expected one: a solution that is cut has no verdict."
      )
    prompts = [self.prompting(loaded.tokenizer, x.prompt) for x in problems[:1]]
    policy = policies.policy_of(loaded, prompts, "LabelRun.policy")
    return policy_samples.PolicySampler(
      model=policy.model,
      params=policy.params,
      tokenizer=loaded.tokenizer,
      new_tokens=self.new_tokens,
      sampling=self.sampling,
      rows=self.rows,
      prompting=self.prompting,
      reader=policy.reader,
    )


def read_pool(
  path: str, segmenter: Segmenter
) -> tuple[list[Problem], list[LabelledSolution], int]:
  """Returns the problems of a pool, their solutions, and the number of samples.

  Args:
    path: `pool.jsonl` of `experiments.search`. Samples that were cut, or have
      no step, are no solutions.
    segmenter: splits a solution, whatever steps the search had: what labels
      steps may not know these, as the oracle of countdown does not know a
      solution that is one step.

  Raises:
    UserError: it cannot be read, or a line is not of a pool.
  """
  problems, found, count = [], [], 0
  for record in jsonl.read(path):
    where = record.where
    problem = Problem.from_json(record.get("problem") or {}, where)
    problems.append(problem)
    samples = record.get("samples")
    if not isinstance(samples, list):
      raise record.wrong("samples", samples, "a list")
    for i, sample in enumerate(samples):
      at = f"{where}: samples[{i}]"
      if not isinstance(sample, dict):
        raise UserError(f"{at}: found {sample!r:.60}, expected an object")
      count += 1
      trace = Trace.from_json(sample.get("trace"), at)
      verdict = Verdict.from_json(sample.get("verdict") or {}, at)
      steps = tuple(steps_of(segmenter, trace.text))
      if trace.complete and steps:
        found.append(
          LabelledSolution(
            prompt=problem.prompt,
            steps=steps,
            labels=(None,) * len(steps),
            final_correct=verdict.correct,
            problem_id=problem.id,
          )
        )
  return problems, found, count
