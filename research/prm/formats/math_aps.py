"""MATH-APS: values of states that OmegaPRM estimated (Luo et al. 2024).

Layouts: github.com/openreasoner/openr. `data/omegaPRM_v2` writes one JSON
object a problem, whose `reasoning_steps` are a flat list of prefixes or a tree;
`prm/code` trains on `question`, `process` with tags, and `label`, where values
above 0.5 are "+" (its docs, "Datasets"). Values have no counts. A record of
the first two has several solutions.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from research.data.sources.jsonl import Record
from research.errors import UserError
from research.prm.formats import files
from research.prm.labelled import MAX_STEPS, Label, LabelledSolution

SEPARATOR = "\n\n"
_SOURCE = "monte_carlo_soft"


def _value(record: Record) -> float | int:
  value = record.get("mc_value")
  if type(value) not in (int, float) or not 0 <= value <= 1:
    raise record.wrong("mc_value", value, "0 to 1")
  return value


def _solution(question: str, steps: Any, labels: Any) -> LabelledSolution:
  return LabelledSolution(
    prompt=question,
    steps=tuple(steps),
    labels=tuple(labels),
    label_source=_SOURCE,
    segmenter_id="blank_line",
  )


def _joined(steps: Sequence[str]) -> str:
  """Returns the text of steps.

  Raises:
    UserError: they would be read as other ones.
  """
  text = SEPARATOR.join(steps)
  if text.split(SEPARATOR) != list(steps):
    raise UserError(
      f"steps: found an empty line in {text!r:.60}, which would end a step"
      " here; expected steps without their separators"
    )
  return text


@dataclasses.dataclass(frozen=True)
class MathAPSFlat:
  """The flat list: a prefix of a solution, question first, and its value."""

  single: ClassVar[bool] = False

  def solutions(self, record: Record) -> list[LabelledSolution]:
    """Returns those prefixes that no other one goes on from.

    A step has the value of the prefix that it ends, or none.
    """
    question = record.text("question")
    values: dict[tuple[str, ...], Label] = {}
    rows = files.items(record, "reasoning_steps", dict, "a list of prefixes")
    for i, row in enumerate(rows):
      prefix = Record(row, f"{record.where}: reasoning_steps[{i}]")
      text = prefix.text("solution_prefix")
      if text != question and not text.startswith(question + SEPARATOR):
        expected = "the question, an empty line, and steps"
        raise prefix.wrong("solution_prefix", text, expected)
      steps = tuple(text[len(question) :].split(SEPARATOR)[1:])
      value = _value(prefix)
      if values.setdefault(steps, value) != value:
        expected = f"{values[steps]}, as an equal prefix before it has"
        raise prefix.wrong("mc_value", value, expected)
    inner = {steps[:n] for steps in values for n in range(len(steps))}
    return [
      _solution(
        question,
        steps,
        [values.get(steps[:n]) for n in range(1, len(steps) + 1)],
      )
      for steps in values
      if steps and steps not in inner
    ]

  def values(self, solution: LabelledSolution) -> dict[str, Any]:
    """Returns the record with each labelled prefix of this solution."""
    prompt, steps = solution.prompt, solution.steps
    return dict(solution.extra) | {
      "question": prompt,
      "reasoning_steps": [
        {
          "solution_prefix": prompt + SEPARATOR + _joined(steps[:n]),
          "mc_value": label,
        }
        for n, label in enumerate(solution.labels, start=1)
        if label is not None
      ],
    }


@dataclasses.dataclass(frozen=True)
class MathAPSTree:
  """The tree: a node's new text, its value, and its children.

  A node may add several steps at once: what binary search jumped over.
  """

  single: ClassVar[bool] = False

  def solutions(self, record: Record) -> list[LabelledSolution]:
    """Returns the way to each leaf; steps inside of a node have no value."""
    question = record.text("question")
    root = record.get("reasoning_steps")
    if not isinstance(root, dict):
      raise record.wrong("reasoning_steps", root, "the root, an object")
    node = Record(root, f"{record.where}: reasoning_steps")
    return [_solution(question, *way) for way in _ways(node)]

  def values(self, solution: LabelledSolution) -> dict[str, Any]:
    """Returns the record of a tree with one way."""
    node: list[dict[str, Any]] = []
    pending: list[str] = []
    labelled = []
    for text, label in zip(solution.steps, solution.labels, strict=True):
      pending.append(text)
      if label is not None:
        labelled.append((_joined(pending), label))
        pending = []
    if pending:
      raise UserError("labels: found none of the last step, expected its value")
    for text, label in reversed(labelled):
      node = [{"text": text, "mc_value": label, "children": node}]
    root = {"text": solution.prompt, "mc_value": None, "children": node}
    return dict(solution.extra) | {
      "question": solution.prompt,
      "reasoning_steps": root,
    }


def _ways(root: Record) -> Iterator[tuple[list[str], list[Label]]]:
  """Yields steps and labels from the root, which is the question, to leaves."""
  waiting: list[tuple[Record, list[str], list[Label]]] = [(root, [], [])]
  count = 0
  while waiting:
    node, steps, labels = waiting.pop()
    count += 1
    if count > MAX_STEPS:
      raise UserError(f"{root.where}: found more than {MAX_STEPS} nodes")
    text = node.text("text")
    if node is not root:
      new = text.split(SEPARATOR)
      steps = steps + new
      labels = labels + [None] * (len(new) - 1) + [_value(node)]
    children = files.items(node, "children", dict, "a list of nodes")
    if not children and steps:
      yield steps, labels
    waiting += [
      (Record(child, f"{node.where}.children[{i}]"), steps, labels)
      for i, child in reversed(list(enumerate(children)))
    ]


@dataclasses.dataclass(frozen=True)
class MathAPSProcess:
  """The layout for training: steps with tags in one text, and their labels.

  Attributes:
    tag: text after each step and a space: one token of Qwen's tokenizer, or
      Math-Shepherd's.
    joiner: text between a tag and the next step.
    name: field with the labels: "label" in the scripts, "labels" in their
      example.
  """

  tag: str = "\n" * 5
  joiner: str = "\n"
  name: str = "label"
  single: ClassVar[bool] = True

  def solutions(self, record: Record) -> list[LabelledSolution]:
    *steps, rest = record.text("process").split(f" {self.tag}")
    if rest or not steps:
      expected = f"steps, each with the tag {self.tag!r} at its end"
      raise record.wrong("process", rest[-40:], expected)
    signs = files.items(record, self.name, (str, int), "'+' or '-', a step")
    allowed = {"+": 1, "-": 0, 1: 1, 0: 0}
    labels = [
      files.choice(record, f"{self.name}[{i}]", sign, allowed)
      for i, sign in enumerate(signs)
    ]
    numbers = [type(sign) is int for sign in signs]
    if any(numbers) != all(numbers):
      raise record.wrong(self.name, signs, "signs or numbers, not both")
    extra = files.extra(record, ("question", "process", self.name))
    if any(numbers):
      extra[files.NUMBERS] = True
    solution = _solution(
      record.text("question"),
      [step.removeprefix(self.joiner) for step in steps],
      labels,
    )
    return [
      dataclasses.replace(
        solution, label_source="monte_carlo_hard", extra=extra
      )
    ]

  def values(self, solution: LabelledSolution) -> dict[str, Any]:
    more = dict(solution.extra)
    signs = (0, 1) if more.pop(files.NUMBERS, False) else "-+"
    tagged = [f"{step} {self.tag}" for step in solution.steps]
    return more | {
      "question": solution.prompt,
      "process": self.joiner.join(tagged),
      self.name: files.hard(solution, signs.__getitem__),
    }
