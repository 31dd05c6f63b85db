"""From tokens of a path to the steps of a text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from research.reasoning.problem import Verdict
from research.reasoning.trace import Finish, Sampler, Step, Trace
from research.search.engine import Path


class StepText(NamedTuple):
  """A step that has a text.

  Attributes:
    text: joined with the others, that of the path.
    start, end: its tokens.
    score: the verifier's, or None.
  """

  text: str
  start: int
  end: int
  score: float | None


def steps_of(path: Path, tokenizer: Any) -> tuple[str, list[StepText]]:
  """Returns a path's text, and its steps.

  A step without text, such as an end token, joins the one before it, whose
  score stands; before the first one it joins the next. Characters whose bytes
  two steps share are the later one's.

  Args:
    path: with a score for each step, or for the first ones alone.
    tokenizer: whose `decode` makes the text.
  """
  whole = tokenizer.decode(path.tokens)
  # A verifier that is asked for the last step's score has those before it.
  scores = [*path.scores, *[None] * (len(path.steps) - len(path.scores))]
  found: list[StepText] = []
  start = end = at = 0
  for tokens, score in zip(path.steps, scores, strict=True):
    end += len(tokens)
    if end < len(path.tokens):
      now = max(at, _common(tokenizer.decode(path.tokens[:end]), whole))
    else:
      now = len(whole)
    text = whole[at:now]
    if text.strip():
      found.append(StepText(text, start, end, score))
    elif found:
      last = found[-1]
      found[-1] = last._replace(text=last.text + text, end=end)
    else:
      continue
    start, at = end, now
  return whole, found


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
    steps: of `steps_of`.
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


def _common(one: str, other: str) -> int:
  """Returns how many characters two texts begin with in common."""
  pairs = zip(one, other, strict=False)
  same = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
  return min(len(one), len(other)) if same is None else same
