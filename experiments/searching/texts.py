"""A path of a search as a trace."""

from collections.abc import Sequence

from research.reasoning.problem import Verdict
from research.reasoning.trace import Finish, Sampler, Step, Trace
from research.search.policy import Path, StepText


def trace_of(
  path: Path,
  steps: Sequence[StepText],
  problem_id: str,
  verdict: Verdict,
  sampler: Sampler,
) -> Trace:
  """Returns a path as a trace.

  Args:
    path: that was found.
    steps: those of `policy.steps_of`.
    problem_id: of its problem.
    verdict: on its text.
    sampler: how it was sampled.
  """
  answer = verdict.canonical
  return Trace(
    problem_id=problem_id,
    steps=tuple(Step(*x) for x in steps),
    finish=finish_of(path),
    final_answer=answer if answer and answer.strip() else None,
    n_prompt=path.prompt,
    n_new=len(path.tokens),
    logprob_sum=path.log_prob,
    sampler=sampler,
  )


def finish_of(path: Path) -> Finish:
  """Returns why a path ended: by itself, or out of tokens, or out of steps."""
  if path.stopped:
    return "eos"
  return "length" if path.done else "cap"
