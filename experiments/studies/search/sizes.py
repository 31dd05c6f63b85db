"""Effective model size: how large a model is as good in a single pass.

A search is compared with a ladder of models, each answering with one greedy
pass. Between two of them the size is interpolated, linearly in its logarithm;
beyond the ladder's ends only a bound is known, and is shown as one.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.studies.listed import NAMED, set_parts
from experiments.studies.protocol import Lines
from experiments.studies.search import systems
from experiments.studies.search.reports import Named, Report, RowsOf
from experiments.studies.search.systems import System
from research.search.protocols import EffectiveSize, effective_size
from research.typing import UserError

RIGHT = "right, %"
"""Column of the accuracies, as in the table of a study."""

SIZE = "size of as good a single pass, thousand parameters"
"""Column of the effective sizes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rung:
  """A model of the ladder.

  Attributes:
    system: its single pass.
    parameters: number, counted alike for all of the ladder.
  """

  system: System | str = dataclasses.field(metadata=NAMED)
  parameters: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EffectiveSizes(Report):
  """Effective sizes of systems, and the ladder that they are measured by.

  `from` and `to` are the sizes at the ends of the 95% intervals over seeds: of
  the system's accuracy, and at the same time of the ladder's, each at its worse
  end. So they contain the size wherever all of these intervals hold. A model of
  one seed has no interval; its accuracy is taken as it is. A system of one seed
  has none, whatever the ladder's.

  The parameters of a verifier do not count, nor does cost: both are beside.

  Attributes:
    ladder: models that differ in size alone, rising; at least two.
    compared: systems to measure.
  """

  ladder: Sequence[Rung | Mapping[str, Any]]
  compared: Named = dataclasses.field(metadata=NAMED)

  def __post_init__(self):
    set_parts(self, ladder=Rung)
    sizes = [x.parameters for x in self.ladder]
    rising = all(a < b for a, b in itertools.pairwise(sizes))
    if len(sizes) < 2 or sizes[0] < 1 or not rising:
      raise UserError(
        f"EffectiveSizes.ladder: found models of {sizes} parameters, expected"
        " at least two, from small to large; order them by Rung.parameters"
      )

  @property
  def systems(self) -> Named:
    """The ladder's, then those that are compared."""
    return (*(x.system for x in self.ladder), *self.compared)

  def lines(self, rows_of: RowsOf) -> Lines:
    ladder = [(x.system, rows_of(x.system)) for x in self.ladder]
    if not all(rows for _, rows in ladder):
      return []
    compared = [(x, rows_of(x)) for x in self.compared]
    return size_lines(
      [x.parameters for x in self.ladder],
      [systems.line(*x) for x in ladder],
      [systems.line(x, rows) for x, rows in compared if rows],
    )


def size_lines(
  sizes: Sequence[int],
  ladder: Sequence[Mapping[str, Any]],
  compared: Sequence[Mapping[str, Any]],
) -> Lines:
  """Returns the lines of effective sizes, given those of the study's table.

  Args:
    sizes: parameters of the ladder's models.
    ladder: line of each of them.
    compared: lines of the systems to measure.
  """
  means = [_value(x[RIGHT]) for x in ladder]
  ends = [_ends(x[RIGHT]) or (_value(x[RIGHT]),) * 2 for x in ladder]
  lows, highs = zip(*ends, strict=True)
  lines = [
    _line(x, size / 1e3, "", "") for size, x in zip(sizes, ladder, strict=True)
  ]
  for system in compared:
    shown = [
      _shown(effective_size(sizes, means, _value(system[RIGHT]))),
      "",
      "",
    ]
    if (interval := _ends(system[RIGHT])) is not None:
      shown[1] = _shown(effective_size(sizes, highs, interval[0]))
      shown[2] = _shown(effective_size(sizes, lows, interval[1]))
    lines.append(_line(system, *shown))
  return lines


def _line(
  line: Mapping[str, Any],
  size: float | str,
  low: float | str,
  high: float | str,
) -> dict[str, Any]:
  return {
    "system": line["system"],
    RIGHT: line[RIGHT],
    SIZE: size,
    "from": low,
    "to": high,
    "MFLOP a problem": line["MFLOP a problem"],
    "seeds": line["seeds"],
  }


def _value(cell: Any) -> float:
  return float(cell[0] if isinstance(cell, list | tuple) else cell)


def _ends(cell: Any) -> tuple[float, float] | None:
  """Returns both ends of a mean's interval; None for one value."""
  if not isinstance(cell, list | tuple):
    return None
  value, half = map(float, cell)
  return value - half, value + half


def _shown(size: EffectiveSize) -> float | str:
  thousands = size.parameters / 1e3
  if size.bound == "between":
    return thousands
  return f"{size.bound} {thousands:.4g}: beyond the ladder"
