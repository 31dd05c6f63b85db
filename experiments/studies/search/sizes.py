"""Effective model size: how large a model is as good in a single pass.

A search is compared with a ladder of models, each answering with one greedy
pass. Between two of them the size is interpolated, linearly in its logarithm;
beyond the ladder's ends only a bound is known, and is shown as one.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
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

Line = Callable[[System], Mapping[str, Any] | None]
"""A system's line of the table of a study; None if it is not there."""


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
    def line(system: System) -> Mapping[str, Any] | None:
      rows = rows_of(system)
      return systems.line(system, rows) if rows else None

    return self.from_table(line)

  def from_table(self, line: Line) -> Lines:
    """Returns the lines, given those of the study's table.

    These are all that it needs, so that it can be made of a stored table, too.
    A mean is a pair: its value and its half.

    Returns:
      No lines where one of the ladder's is missing.
    """
    every = [line(x.system) for x in self.ladder]
    rungs = [x for x in every if x is not None]
    if len(rungs) < len(every):
      return []
    sizes = [x.parameters for x in self.ladder]
    ends = [_ends(x[RIGHT]) or (_value(x[RIGHT]),) * 2 for x in rungs]
    lows, highs = zip(*ends, strict=True)
    means = [_value(x[RIGHT]) for x in rungs]
    out = []
    for size, rung in zip(sizes, rungs, strict=True):
      out.append(_line(rung, size / 1e3, "", ""))
    for system in self.compared:
      if (own := line(system)) is None:
        continue
      shown = [_shown(effective_size(sizes, means, _value(own[RIGHT]))), "", ""]
      if (both := _ends(own[RIGHT])) is not None:
        shown[1] = _shown(effective_size(sizes, highs, both[0]))
        shown[2] = _shown(effective_size(sizes, lows, both[1]))
      out.append(_line(own, *shown))
    return out


def _line(
  own: Mapping[str, Any], size: float | str, low: float | str, high: float | str
) -> dict[str, Any]:
  return {
    "system": own["system"],
    RIGHT: own[RIGHT],
    SIZE: size,
    "from": low,
    "to": high,
    "MFLOP a problem": own["MFLOP a problem"],
    "seeds": own["seeds"],
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
