"""Solutions that a policy samples, and labels of their steps.

On-policy data of a process reward model. A solution is sampled whole and cut
into steps; an exact oracle of the task says which step is the first wrong one,
rollouts from the ends of steps say how often the policy still succeeds. Both
may stand in one record: `labels` and `mc` of a `LabelledSolution`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax

from research.generation.sampling import Sampling
from research.generation.stepwise import PromptReader
from research.nn.transformer import Transformer
from research.prm.labelled import LabelledSolution
from research.prm.labels.oracle import label_steps
from research.prm.labels.rollouts import Rollout, count
from research.reasoning.problem import Problem, StepVerifier, Verifier
from research.reasoning.prompting import Prompting, as_text, followed_by
from research.reasoning.segmentation import Segmenter, steps_of
from research.reasoning.trace import MonteCarlo
from research.training.alignment.rewarded_task import sampled
from research.typing import Params, PRNGKey, UserError

EXACT = "exact_first_error"
"""`label_source` of an oracle's labels, which end at the first error."""


@runtime_checkable
class TextSampler(Protocol):
  """Writes what follows the beginnings of solutions, many at once."""

  def __call__(
    self, prompts: Sequence[Any], key: PRNGKey
  ) -> Sequence[str | None]:
    """Returns the text after each prompt; None where it was cut."""
    ...

  def prompt(self, problem: Problem, steps: Sequence[str] = ()) -> Any:
    """Returns what it reads of a problem, and of steps of a solution."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PolicySampler:
  """A policy as a `TextSampler`.

  Attributes:
    model: the Transformer.
    params: its parameters, preferably from `generate.prepare`.
    tokenizer: encodes and decodes; its `stop` ids end a text.
    new_tokens: maximum number of tokens of a text.
    sampling: how tokens are drawn.
    rows: batch size, at most. All batches of a call have as many rows, so that
      programs compile once for each length of prompts; of fewer prompts the
      next power of two.
    prompting: what the policy reads of a problem.
    reader: gives the parameters that read prompts; None: `params` do.
  """

  model: Transformer
  params: Params
  tokenizer: Any
  new_tokens: int
  sampling: Sampling = Sampling(temperature=1.0)
  rows: int = 1024
  prompting: Prompting = as_text
  reader: PromptReader | None = None

  def __call__(
    self, prompts: Sequence[Sequence[int]], key: PRNGKey
  ) -> list[str | None]:
    """Returns the text after each prompt; None where it was cut.

    Args:
      prompts: token ids; equal ones get different texts.
    """
    # Those of one length together, which is padded alike.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts: list[str | None] = [None] * len(prompts)
    rows = min(self.rows, 1 << (len(order) - 1).bit_length()) if order else 1
    for start in range(0, len(order), rows):
      batch = order[start : start + rows]
      padded = [*batch, *[batch[-1]] * (rows - len(batch))]
      batch_prompts = [prompts[i] for i in padded]
      reader = self.reader
      answers = sampled(
        self.model,
        self.params if reader is None else reader(batch_prompts),
        batch_prompts,
        self.new_tokens,
        self.tokenizer.stop,
        self.sampling,
        jax.random.fold_in(key, start),
        None if reader is None else reader.mask,
      )
      for i, answer in zip(batch, answers, strict=False):
        if answer and answer[-1] in self.tokenizer.stop:
          texts[i] = self.tokenizer.decode(answer)
    return texts

  def prompt(
    self, problem: Problem, steps: Sequence[str] = ()
  ) -> Sequence[int]:
    """Returns the prompt of a problem, and of steps of a solution.

    Steps are encoded one by one, so that no token reaches from one to another.
    """
    encode = self.tokenizer.encode
    begin = self.prompting(self.tokenizer, problem.prompt)
    return followed_by(begin, [token for x in steps for token in encode(x)])


def sample_solutions(
  sampler: TextSampler,
  verifier: Verifier,
  problems: Sequence[Problem],
  copies: int,
  segmenter: Segmenter,
  key: PRNGKey,
) -> list[LabelledSolution]:
  """Returns solutions in steps, judged as a whole; no step has a label.

  Solutions that were cut, or have no step, are left out: there are fewer than
  `copies` for each problem then.

  Args:
    sampler: the policy.
    verifier: judges whole solutions.
    copies: number of solutions of each problem.
    segmenter: splits a solution.
  """
  repeated = [problem for problem in problems for _ in range(copies)]
  texts = sampler([sampler.prompt(problem) for problem in repeated], key)
  solutions = []
  for problem, text in zip(repeated, texts, strict=True):
    steps = tuple(steps_of(segmenter, text or ""))
    if steps:
      solutions.append(
        LabelledSolution(
          prompt=problem.prompt,
          steps=steps,
          labels=(None,) * len(steps),
          final_correct=verifier.verify(problem, text).correct,
          problem_id=problem.id,
        )
      )
  return solutions


def with_exact_labels(
  solutions: Sequence[LabelledSolution],
  verifier: StepVerifier,
  problems: Sequence[Problem],
) -> list[LabelledSolution]:
  """Returns solutions with an oracle's labels, unknown after the first error.

  Args:
    verifier: judges steps exactly.
    problems: at least those of the solutions.
  """
  problem_of = _by_prompt(problems)

  def labels(solution):
    problem = problem_of[solution.prompt]
    return label_steps(
      solution.steps,
      lambda before, step: verifier.verify_step(problem, before, step).label,
    )

  return [x.relabelled(labels(x), EXACT) for x in solutions]


def with_rollouts(
  solutions: Sequence[LabelledSolution],
  sampler: TextSampler,
  verifier: Verifier,
  problems: Sequence[Problem],
  k: int,
  key: PRNGKey,
) -> list[LabelledSolution]:
  """Returns solutions with the counts of k rollouts from the end of each step.

  As `labels.monte_carlo`, for all solutions at once: a prefix that several of
  them share is completed k times, not k times for each. The last step needs no
  rollout: its count is the verdict.

  Args:
    sampler: the policy that completes them.
    verifier: judges whole solutions.
    problems: at least those of the solutions.
    k: number of rollouts of each prefix.

  Raises:
    UserError: k is below 1.
  """
  if k < 1:
    raise UserError(f"rollouts: found k = {k}, expected one at least")
  problem_of = _by_prompt(problems)
  prefixes = dict.fromkeys(
    (solution.prompt, solution.steps[:n])
    for solution in solutions
    for n in range(1, len(solution.steps))
  )
  prompts = [
    sampler.prompt(problem_of[prompt], steps)
    for prompt, steps in prefixes
    for _ in range(k)
  ]
  texts = sampler(prompts, key) if prompts else []

  @functools.cache
  def right(prompt: str, text: str) -> bool:
    return verifier.verify(problem_of[prompt], text).correct

  counts: dict[Any, MonteCarlo] = {}
  for i, (prompt, steps) in enumerate(prefixes):
    begin = "".join(steps)
    rollouts = [
      Rollout((text or "",), text is not None and right(prompt, begin + text))
      for text in texts[i * k : (i + 1) * k]
    ]
    counts[prompt, steps] = count(rollouts)

  def counted(solution: LabelledSolution) -> LabelledSolution:
    inner = (
      counts[solution.prompt, solution.steps[:n]]
      for n in range(1, len(solution.steps))
    )
    correct = solution.final_correct
    if correct is None:
      correct = right(solution.prompt, "".join(solution.steps))
    last = MonteCarlo(int(correct), 1)
    return dataclasses.replace(solution, mc=(*inner, last))

  return [counted(solution) for solution in solutions]


def _by_prompt(problems: Sequence[Problem]) -> dict[str, Problem]:
  # Not by id: countdown's is one for all orders of its numbers.
  return {problem.prompt: problem for problem in problems}
