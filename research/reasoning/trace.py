"""A trace: one solution of a problem, in steps, with why it ended.

The types refuse what evaluation code often gets wrong. A trace always says why
it ended, so that one which ran out of tokens is never taken for complete. A
trace without an answer casts no vote: an empty text is no answer. A step has
text, and as many scores as steps exist.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from research.errors import UserError
from research.io.fields import Fields

Finish = Literal["eos", "stop", "length", "cap"]
"""Why a trace ended.

* "eos": the model ended its solution, by a token or text that ends solutions;
* "stop": generation paused at the end of a step, and may go on;
* "length": its tokens ran out, in the middle of whatever it was writing;
* "cap": its steps ran out.
"""


class MonteCarlo(NamedTuple):
  """Rollouts from the end of a step, and how many of them were correct.

  Keep the counts: a hard label's bias depends on the number of rollouts, so
  that labels of different numbers cannot be compared once these are gone.
  """

  correct: int
  rollouts: int

  @property
  def value(self) -> float:
    """The estimate `c / k` of the completer's value of this state."""
    return self.correct / self.rollouts


def check_counts(counts: MonteCarlo, where: str) -> MonteCarlo:
  """Returns the counts.

  Raises:
    UserError: not `0 <= correct <= rollouts`, or there are no rollouts.
  """
  if not (0 <= counts.correct <= counts.rollouts and counts.rollouts > 0):
    raise UserError(
      f"{where}: found {counts.correct} correct of {counts.rollouts} rollouts,"
      " expected one rollout at least, and no more correct than there are"
    )
  return counts


@dataclasses.dataclass(frozen=True)
class Step:
  """One step of a trace.

  Attributes:
    text: the step's text, its separator included; not blank.
    start, end: its tokens `[start, end)`, counted from the first new token;
      None where tokens are unknown.
    score: a process reward model's score, or None.
    label: 0 (wrong) to 1 (right), soft in between; None where unknown.
    mc: rollouts from the end of this step, or None.
  """

  text: str
  start: int | None = None
  end: int | None = None
  score: float | int | None = None
  label: float | int | None = None
  mc: MonteCarlo | None = None

  def __post_init__(self) -> None:
    if not self.text.strip():
      raise UserError(
        f"Step: found the blank text {self.text!r}, expected a step; strip a"
        " solution before it is split, so that no step is empty"
      )
    if (self.start is None) != (self.end is None):
      raise UserError("Step: found start or end alone, expected both or none")
    if self.start is not None and not 0 <= self.start < (self.end or 0):
      raise UserError(
        f"Step: found tokens {self.start} to {self.end}, expected one at least"
      )
    if self.score is not None and math.isnan(self.score):
      raise UserError(
        "Step: found a score that is not a number; did it diverge?"
      )
    if self.label is not None and not 0 <= self.label <= 1:
      raise UserError(f"Step: found the label {self.label}, expected 0 to 1")
    if self.mc is not None:
      check_counts(self.mc, "Step")


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How a trace was sampled.

  Attributes:
    temperature, top_p: settings of the sampling; temperature 0 is greedy.
    seed: seed of its key.
    policy_id: name of the policy, such as a checkpoint's digest.
  """

  temperature: float | int = 1.0
  top_p: float | int = 1.0
  seed: int = 0
  policy_id: str = ""


@dataclasses.dataclass(frozen=True)
class Trace:
  """A solution in steps.

  Attributes:
    problem_id: id of the problem that it solves.
    steps: first to last.
    finish: why it ended.
    final_answer: what was extracted, in canonical form; None for nothing.
    n_prompt, n_new: number of tokens of the prompt, and of new ones.
    logprob_sum: log-probability of the new tokens under the policy, in nats, or
      None.
    sampler: how it was sampled, or None.
  """

  problem_id: str
  steps: tuple[Step, ...]
  finish: Finish
  final_answer: str | None = None
  n_prompt: int = 0
  n_new: int = 0
  logprob_sum: float | int | None = None
  sampler: Sampler | None = None

  def __post_init__(self) -> None:
    where = f"Trace of {self.problem_id!r}"
    if self.final_answer is not None and not self.final_answer.strip():
      raise UserError(
        f"{where}: found an empty final answer, expected None, which is no vote"
      )
    end = 0
    for i, step in enumerate(self.steps):
      if step.start is None:
        continue
      if step.start < end:
        raise UserError(
          f"{where}: step {i} starts at token {step.start}, expected {end} or"
          " later, where the step before it ends"
        )
      end = step.end or 0
    if end > self.n_new:
      raise UserError(
        f"{where}: steps end at token {end}, expected at most n_new,"
        f" {self.n_new}"
      )

  @property
  def complete(self) -> bool:
    """Whether the model ended it; one that was cut is never complete."""
    return self.finish == "eos"

  @property
  def vote(self) -> str | None:
    """The answer of a complete trace, or None, which is no vote.

    What looks like an answer in a trace that was cut may be the middle of one.
    """
    return self.final_answer if self.complete else None

  @property
  def text(self) -> str:
    """The steps' texts, joined."""
    return "".join(step.text for step in self.steps)

  def to_json(self) -> dict[str, Any]:
    """Returns the trace as a JSON object, without its empty fields."""
    values = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
    }
    values["steps"] = [_without_none(dataclasses.asdict(x)) for x in self.steps]
    for step in values["steps"]:
      if "mc" in step:
        step["mc"] = {"c": step["mc"][0], "k": step["mc"][1]}
    if self.sampler is not None:
      values["sampler"] = dataclasses.asdict(self.sampler)
    return _without_none(values)

  @classmethod
  def from_json(cls, values: Any, where: str = "trace") -> "Trace":
    """Returns the trace that `to_json` wrote.

    Args:
      values: the JSON object, from any source.

    Raises:
      UserError: a field is missing, unknown, or not what it should be.
    """
    fields = _fields(values, where, Trace)
    if fields.get("finish") not in get_args(Finish):
      raise fields.wrong("finish", ", ".join(get_args(Finish)))
    steps = fields.get("steps")
    if not isinstance(steps, list):
      raise fields.wrong("steps", "a list")
    parsed = dict(values)
    parsed["steps"] = tuple(
      _step(step, f"{where}: steps[{i}]") for i, step in enumerate(steps)
    )
    if parsed.get("sampler") is not None:
      sampler = _fields(parsed["sampler"], f"{where}: sampler", Sampler)
      parsed["sampler"] = Sampler(**sampler.values)
    try:
      return cls(**parsed)
    except UserError as error:
      raise UserError(f"{where}: {error}") from error


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in values.items() if value is not None}


def _step(values: Any, where: str) -> Step:
  parsed = dict(_fields(values, where, Step).values)
  counts = parsed.get("mc")
  if counts is not None:
    if not isinstance(counts, dict) or set(counts) != {"c", "k"}:
      raise UserError(f"{where}: mc is {counts!r}, expected c and k")
    pair = Fields(counts, f"{where}: mc")
    parsed["mc"] = MonteCarlo(pair.integer("c", least=0), pair.integer("k"))
  try:
    return Step(**parsed)
  except UserError as error:
    raise UserError(f"{where}: {error}") from error


_TYPES: Mapping[str, tuple[type, ...]] = {
  **dict.fromkeys(("problem_id", "text", "finish"), (str,)),
  **dict.fromkeys(("policy_id", "final_answer"), (str,)),
  **dict.fromkeys(("n_prompt", "n_new", "start", "end", "seed"), (int,)),
  **dict.fromkeys(("score", "label", "logprob_sum"), (int, float)),
  **dict.fromkeys(("temperature", "top_p"), (int, float)),
}
"""Of fields: their types in JSON."""


def _fields(values: Any, where: str, kind: type) -> Fields:
  """Returns an object's fields, whose names and types are those of a class."""
  if not isinstance(values, dict):
    raise UserError(f"{where}: found {str(values)[:60]!r}, expected an object")
  known = {field.name: field for field in dataclasses.fields(kind)}
  for name in values:
    if name not in known:
      raise UserError(
        f"{where}: found the field {name!r}, expected {', '.join(known)}"
      )
  fields = Fields(values, where)
  for name, field in known.items():
    value = values.get(name)
    required = field.default is dataclasses.MISSING
    if value is None and required:
      raise fields.wrong(name, "a value")
    types = _TYPES.get(name)
    if types and value is not None and type(value) not in types:
      raise fields.wrong(name, " or ".join(x.__name__ for x in types))
  return fields
