"""What a reasoning task is made of: problems, verdicts, and who gives them.

A `Problem` is asked, a `Verifier` judges a text that answers it, and a
`StepVerifier` judges each of its steps as well. Problems and verdicts are plain
JSON both ways, so that pools of samples can be kept and scored by others.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, get_type_hints, runtime_checkable

from research.errors import UserError

Label = Literal["ok", "error", "unknown"]
"""Of a step: right, wrong, or not decided."""

LABELS = "ok", "error", "unknown"

_KINDS = {Mapping[str, Any]: Mapping, Label: str}
"""What `isinstance` takes, of annotations that it does not."""


@dataclasses.dataclass(frozen=True)
class Problem:
  """A question that a verifier can judge answers to.

  Attributes:
    id: unique within its task, and the same in every run.
    prompt: what the model reads.
    answer: the reference answer; None where the prompt alone decides, as in
      countdown.
    meta: what the verifier and reports need besides, of JSON's types.
    difficulty: larger is harder, on the task's own scale; None if unknown.
  """

  id: str
  prompt: str
  answer: str | None = None
  meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  difficulty: float | int | None = None

  def __post_init__(self):
    if wrong := next(_not_json(self.meta, "meta"), None):
      raise UserError(
        f"Problem {self.id!r}: {wrong}.\nExpected what JSON can write, lists"
        " instead of tuples, so that a file gives back the same problem."
      )

  def to_json(self) -> dict[str, Any]:
    """Returns the fields, ready for `json.dumps`."""
    return _fields(self) | {"meta": dict(self.meta)}

  @classmethod
  def from_json(cls, values: Mapping[str, Any], where: str = "") -> "Problem":
    """Returns what `to_json` wrote.

    Args:
      values: a JSON object with the class's fields and no others.
      where: names the object in errors, such as `FILE:LINE`.

    Raises:
      UserError: a field is missing, unknown, or of the wrong type.
    """
    return _read(cls, values, where)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a verifier says of a text.

  Attributes:
    correct: whether the text answers the problem.
    extracted: the answer in the text; None where there is none, and then
      nothing may vote for it.
    canonical: the form of the answer under which equal answers are counted
      together; None with `extracted`.
    reason: "correct", "wrong", "no answer", "timeout" or "error", and after a
      colon what it was.
  """

  correct: bool
  extracted: str | None = None
  canonical: str | None = None
  reason: str = ""

  def __post_init__(self):
    if (self.extracted is None) != (self.canonical is None):
      raise UserError(
        f"Verdict: found extracted={self.extracted!r} and canonical="
        f"{self.canonical!r}, expected both or neither to be None."
      )
    if self.correct and self.extracted is None:
      raise UserError("Verdict: a text without an answer cannot be correct.")

  def to_json(self) -> dict[str, Any]:
    """Returns the fields, ready for `json.dumps`."""
    return _fields(self)

  @classmethod
  def from_json(cls, values: Mapping[str, Any], where: str = "") -> "Verdict":
    """Returns what `to_json` wrote; see `Problem.from_json`."""
    return _read(cls, values, where)


@dataclasses.dataclass(frozen=True)
class StepVerdict:
  """What an oracle says of one step.

  Attributes:
    label: "ok" if the steps up to this one are right, "error" if they are not,
      "unknown" if the oracle cannot say.
    reason: in words; "" for a step that is right.
  """

  label: Label
  reason: str = ""

  def to_json(self) -> dict[str, Any]:
    """Returns the fields, ready for `json.dumps`."""
    return _fields(self)

  @classmethod
  def from_json(
    cls, values: Mapping[str, Any], where: str = ""
  ) -> "StepVerdict":
    """Returns what `to_json` wrote; see `Problem.from_json`."""
    if values.get("label", "ok") not in LABELS:
      raise UserError(
        f"{where or 'StepVerdict'}: label: found {values['label']!r:.60},"
        f" expected one of {', '.join(LABELS)}."
      )
    return _read(cls, values, where)


@runtime_checkable
class Verifier(Protocol):
  """Judges a text; the same text always gets the same verdict."""

  def verify(self, problem: Problem, text: str | None) -> Verdict:
    """Returns the verdict on a text; None stands for no text at all."""
    ...


@runtime_checkable
class StepVerifier(Verifier, Protocol):
  """Judges steps as well."""

  def verify_step(
    self, problem: Problem, steps: Sequence[str], step: str
  ) -> StepVerdict:
    """Returns the verdict on a step, given the steps before it."""
    ...


def first_error(
  verifier: StepVerifier, problem: Problem, steps: Sequence[str]
) -> int | None:
  """Returns the index of the first wrong step, -1 if there is none.

  ProcessBench's label (Zheng et al. 2024, arXiv:2412.06559). None if the
  verifier cannot say of a step before the first error.
  """
  for i, step in enumerate(steps):
    label = verifier.verify_step(problem, steps[:i], step).label
    if label != "ok":
      return i if label == "error" else None
  return -1


def _fields(value: Any) -> dict[str, Any]:
  return {x.name: getattr(value, x.name) for x in dataclasses.fields(value)}


def _read(cls: type, values: Mapping[str, Any], where: str) -> Any:
  """Returns a dataclass of values that came from a file."""
  fields = {x.name: x for x in dataclasses.fields(cls)}
  absent = dataclasses.MISSING
  required = [
    name
    for name, x in fields.items()
    if x.default is absent and x.default_factory is absent
  ]
  unknown = [name for name in values if name not in fields]
  missing = [name for name in required if name not in values]
  if unknown or missing:
    mistake = f"{unknown[0]!r}" if unknown else f"no {missing[0]!r}"
    raise UserError(
      f"{where or cls.__name__}: found {mistake} in a {cls.__name__}, expected"
      f" {', '.join(fields)}."
    )
  kinds = get_type_hints(cls)
  for name, value in values.items():
    kind = _KINDS.get(kinds[name], kinds[name])
    # JSON's true is no number, though Python's is.
    stray = isinstance(value, bool) and kind is not bool
    if not isinstance(value, kind) or stray:
      raise UserError(
        f"{where or cls.__name__}: field {name!r}: found {value!r:.60},"
        f" expected {getattr(kind, '__name__', kind)}."
      )
  try:
    return cls(**values)
  except UserError as error:
    raise UserError(f"{where}: {error}" if where else str(error)) from error


def _not_json(value: Any, where: str) -> Iterator[str]:
  """Yields what JSON would change or refuse, and where it is."""
  if isinstance(value, Mapping):
    for name, x in value.items():
      if not isinstance(name, str):
        yield f"{where}: found the key {name!r}, expected text"
      else:
        yield from _not_json(x, f"{where}.{name}")
  elif isinstance(value, list):
    for i, x in enumerate(value):
      yield from _not_json(x, f"{where}[{i}]")
  elif isinstance(value, float) and not math.isfinite(value):
    yield f"{where}: found {value}"
  elif not (value is None or isinstance(value, bool | int | float | str)):
    yield f"{where}: found a {type(value).__name__}"
