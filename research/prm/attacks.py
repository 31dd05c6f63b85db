"""Solutions changed so that what is true of their steps stays known.

A reward model that reads steps should not care how they are worded, padded or
ordered, and should care where one is wrong. Shihab et al. 2026 (EST-PRM,
arXiv:2606.00437): inflation, reordering of steps that do not need each other,
and words of confidence, all of which leave labels as they are. Tiwari et al.
2026 ("Reward Under Attack", arXiv:2603.06621) set such changes of style beside
corruptions of the logic, which a model must notice. `scores.attack_report`
says what scores made of them.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from research.errors import UserError
from research.prm.labelled import Label, LabelledSolution
from research.prm.scores.aggregate import VALUE_SOURCES

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_NAME = re.compile(r"\b[^\W\d_]\b")


class Attacked(NamedTuple):
  """A changed solution.

  Attributes:
    solution: the changed solution, with what is known of its steps.
    origin: for each of its steps, the index of the step that it was; None for a
      step that was put in.
  """

  solution: LabelledSolution
  origin: tuple[int | None, ...]


@runtime_checkable
class Attack(Protocol):
  """A pure change of a solution."""

  def __call__(self, solution: LabelledSolution) -> Attacked:
    """Returns the changed solution."""
    ...


FILLERS = (
  "Let us restate what we have so far.",
  "This follows from the step before.",
  "We now go on to the next part of the problem.",
  "It helps to keep the goal in mind.",
)
"""Steps that say nothing that could be wrong."""

MARKERS = (
  "Clearly,",
  "It is certain that",
  "Without any doubt,",
  "We have verified that",
)
"""Words of confidence, which are no evidence."""


@dataclasses.dataclass(frozen=True)
class Inflated:
  """Steps that say nothing, after each step.

  Where labels are values (`label_source`), such a step has the value of the
  state, that of the step before. Elsewhere it is right as long as all before
  it are, and then unknown: labels end at the first error.

  Attributes:
    fillers: taken in turn; whole steps, with the separator of the others.
    each: how many after each step.
  """

  fillers: tuple[str, ...] = FILLERS
  each: int = 1

  def __post_init__(self) -> None:
    if self.each < 1 or not self.fillers:
      raise UserError(
        f"Inflated: found {self.each} steps of {len(self.fillers)} fillers,"
        " expected at least 1 of each"
      )

  def __call__(self, solution: LabelledSolution) -> Attacked:
    """Returns the solution with fillers; see `Attack`."""
    values = solution.label_source in VALUE_SOURCES
    usual = next(filter(None, map(_ending, solution.steps)), "")
    steps: list[str] = []
    labels: list[Label] = []
    origin: list[int | None] = []
    put_in = 0
    for i, (step, label) in enumerate(
      zip(solution.steps, solution.labels, strict=True)
    ):
      # A text's last step has no separator, and needs one before a filler.
      ending = _ending(step) or usual
      steps.append(step.rstrip() + ending)
      labels.append(label)
      origin.append(i)
      right = all(x == 1 for x in solution.labels[: i + 1])
      for _ in range(self.each):
        filler = self.fillers[put_in % len(self.fillers)]
        steps.append(filler + ending)
        labels.append(label if values else 1 if right else None)
        origin.append(None)
        put_in += 1
    if steps:
      steps[-1] = steps[-1].rstrip() + _ending(solution.steps[-1])
    return _changed(solution, steps, labels, origin)


@dataclasses.dataclass(frozen=True)
class Confident:
  """Words of confidence before each step, whether it is right or wrong.

  Attributes:
    markers: taken in turn.
  """

  markers: tuple[str, ...] = MARKERS

  def __post_init__(self) -> None:
    if not self.markers:
      raise UserError("Confident: found no markers, expected one at least")

  def __call__(self, solution: LabelledSolution) -> Attacked:
    """Returns the solution in other words; see `Attack`."""
    steps = [
      f"{self.markers[i % len(self.markers)]} {step}"
      for i, step in enumerate(solution.steps)
    ]
    origin = range(len(steps))
    return _changed(solution, steps, solution.labels, list(origin))


def may_need(first: str, second: str) -> bool:
  """Whether the second of two steps may need the first one.

  It may unless both have numbers, and they have no number and no name of one
  letter in common.
  """
  numbers = [set(_NUMBER.findall(step)) for step in (first, second)]
  names = [set(_NAME.findall(step)) for step in (first, second)]
  apart = all(numbers) and not numbers[0] & numbers[1]
  return not apart or bool(names[0] & names[1])


@dataclasses.dataclass(frozen=True)
class Reordered:
  """Neighbours that do not need each other change places.

  Each step moves by one place at most, with its label. Only steps that are
  known to be right or wrong move. Where labels are values, the state between
  the two was never reached, and its value is unknown.

  Attributes:
    needs: whether the second of two steps may need the first one.
  """

  needs: Callable[[str, str], bool] = may_need

  def __call__(self, solution: LabelledSolution) -> Attacked:
    """Returns the solution in another order; see `Attack`."""
    order = list(range(len(solution.steps)))
    labels = list(solution.labels)
    values = solution.label_source in VALUE_SOURCES
    i = 0
    while i + 1 < len(order):
      known = None not in labels[i : i + 2]
      if not known or self.needs(*solution.steps[i : i + 2]):
        i += 1
        continue
      order[i : i + 2] = i + 1, i
      second = labels[i + 1]
      labels[i : i + 2] = (None, second) if values else (second, labels[i])
      i += 2
    # Separators stay where they are: that of the last step is often empty.
    steps = [
      solution.steps[k].rstrip() + _ending(solution.steps[at])
      for at, k in enumerate(order)
    ]
    return _changed(solution, steps, labels, list(order))


@dataclasses.dataclass(frozen=True)
class Merged:
  """Pairs of neighbours become one step: another way to cut the same text.

  Attributes:
    separator: between two steps that have no white space there, as those of
      ProcessBench and TRL, which models read with a separator of their own.
  """

  separator: str = "\n\n"

  def __call__(self, solution: LabelledSolution) -> Attacked:
    """Returns the solution in half as many steps; see `Attack`.

    A pair is right if both are, and wrong if one is; values are those of its
    end.
    """
    values = solution.label_source in VALUE_SOURCES
    steps, labels, origin = [], [], []
    for i in range(0, len(solution.steps), 2):
      pair = solution.labels[i : i + 2]
      if not values and 0 in pair:
        label = 0
      else:
        label = None if None in pair and not values else pair[-1]
      first, *rest = solution.steps[i : i + 2]
      apart = not rest or _ending(first) or rest[0][:1].isspace()
      steps.append(("" if apart else self.separator).join([first, *rest]))
      labels.append(label)
      origin.append(min(i + 1, len(solution.steps) - 1))
    return _changed(solution, steps, labels, origin)


@dataclasses.dataclass(frozen=True)
class Split:
  """Each step is cut in two at the space nearest to its middle."""

  def __call__(self, solution: LabelledSolution) -> Attacked:
    """Returns the solution in up to twice as many steps; see `Attack`.

    The second part has the step's label. The first one is right if the step is;
    else nothing is known of it.
    """
    values = solution.label_source in VALUE_SOURCES
    steps, labels, origin = [], [], []
    for i, (step, label) in enumerate(
      zip(solution.steps, solution.labels, strict=True)
    ):
      spaces = [x.end() for x in re.finditer(r"(?<=\S)\s+(?=\S)", step)]
      if spaces:
        at = min(spaces, key=lambda x: abs(2 * x - len(step)))
        steps.append(step[:at])
        labels.append(1 if label == 1 and not values else None)
        origin.append(None)
        step = step[at:]
      steps.append(step)
      labels.append(label)
      origin.append(i)
    return _changed(solution, steps, labels, origin)


@dataclasses.dataclass(frozen=True)
class Corrupted:
  """A right step's result becomes a wrong one: what must lower a score.

  Its last number after an equals sign is one more than it was. All after it is
  unknown. Not an attack that a model should be deaf to, but the control beside
  them: one that hears neither style nor errors hears nothing.

  Attributes:
    seed: random seed of the choice among right steps with a result.
  """

  seed: int = 0

  def __call__(self, solution: LabelledSolution) -> Attacked:
    """Returns the solution with one error; unchanged if no step has a result.

    See `Attack`.
    """
    origin = list(range(len(solution.steps)))
    places = {
      i: place
      for i, (step, label) in enumerate(
        zip(solution.steps, solution.labels, strict=True)
      )
      if label == 1 and (place := _result(step)) is not None
    }
    if not places:
      return Attacked(solution, tuple(origin))
    rng = np.random.default_rng(self.seed)
    at = int(rng.choice(sorted(places)))
    begin, end = places[at]
    step = solution.steps[at]
    wrong = f"{step[:begin]}{int(step[begin:end]) + 1}{step[end:]}"
    steps = [wrong if i == at else x for i, x in enumerate(solution.steps)]
    labels = [*solution.labels[:at], 0, *[None] * (len(steps) - at - 1)]
    return _changed(solution, steps, labels, origin)


ATTACKS = {
  "confident": Confident(),
  "corrupted": Corrupted(),
  "inflated": Inflated(),
  "merged": Merged(),
  "reordered": Reordered(),
  "split": Split(),
}
"""By the names that tables use; `corrupted` is the control."""


def _result(step: str) -> tuple[int, int] | None:
  """Returns where the whole number after the last equals sign stands."""
  matches = list(re.finditer(r"=\s*(-?\d{1,15})(?!\d|\.\d)", step))
  return matches[-1].span(1) if matches else None


def _ending(step: str) -> str:
  """Returns the white space that a step ends in: its separator."""
  return step[len(step.rstrip()) :]


def _changed(
  solution: LabelledSolution,
  steps: Sequence[str],
  labels: Sequence[Label],
  origin: Sequence[int | None],
) -> Attacked:
  """Returns the solution with other steps; what was said of the old ones goes.

  The final answer is that of before.
  """
  changed = dataclasses.replace(
    solution,
    steps=tuple(steps),
    labels=tuple(labels),
    mc=None,
    critiques=(),
    extra={},
  )
  return Attacked(changed, tuple(origin))
