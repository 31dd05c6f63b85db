"""The picture of a sweep: a metric over what was varied."""

import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from research.training.reports import plots

Group = tuple[Mapping[str, Any], Sequence[float]]
"""What a group of runs shares, by name, and the metric of each (its seeds)."""

MAX_INSIDE_LEGEND = 8
"""Lines that still get a legend of their own beside the picture."""


def plot_sweep(
  groups: Sequence[Group],
  picture: str | os.PathLike,
  *,
  axis: str,
  metric: str,
  title: str,
) -> None:
  """Draws a metric over one axis of a sweep, a line for all else, into a PNG.

  Lines go through the means over seeds; each run is a dot, and the band goes
  from the least to the greatest.

  Args:
    groups: at least one, with at least one run each.
    picture: the PNG.
    axis: the name on the x axis; groups without it are left out.
    metric: the y axis.
    title: above the picture.
  """
  here = [(unit, values) for unit, values in groups if axis in unit]
  place, scale = _places([unit[axis] for unit, _ in here])
  lines: dict[str, list[tuple[float, Sequence[float]]]] = {}
  for unit, values in here:
    label = ", ".join(f"{_last(k)}={v}" for k, v in unit.items() if k != axis)
    lines.setdefault(label, []).append((place[repr(unit[axis])], values))

  seeds = any(len(values) > 1 for _, values in here)
  drawn = plots.figure(7.5, 4.6)
  axes = drawn.add_subplot()
  for number, (label, points) in enumerate(lines.items()):
    points = sorted(points, key=lambda x: x[0])
    x = [at for at, _ in points]
    look = plots.style(number)
    means = [statistics.fmean(values) for _, values in points]
    axes.plot(x, means, marker="o", markersize=6, label=label, **look)
    low, high = ([f(v) for _, v in points] for f in (min, max))
    axes.fill_between(
      x, low, high, alpha=0.15, linewidth=0, color=look["color"]
    )
    for at, values in points:
      axes.plot(
        [at] * len(values),
        values,
        "o",
        markersize=4,
        color=look["color"],
        markerfacecolor="white",
      )
  _ticks(axes, [unit[axis] for unit, _ in here], place, scale)
  title += " (means over seeds; each dot is a run)" if seeds else ""
  axes.set(xlabel=axis, ylabel=metric, title=title)
  axes.grid(alpha=0.3)
  if list(lines) != [""]:
    outside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    axes.legend(
      frameon=False, **(outside if len(lines) > MAX_INSIDE_LEGEND else {})
    )
  plots.save(drawn, picture)


def _places(values: Sequence[Any]) -> tuple[dict[str, float], str]:
  """Returns where each value is on the axis, and what kind of axis it is.

  Numbers are where they are, on a logarithmic axis if they span a factor of
  eight; anything else has a place of its own, in order of appearance.
  """
  numbers = [
    v for v in values if isinstance(v, int | float) and not isinstance(v, bool)
  ]
  if len(numbers) < len(values):
    names = dict.fromkeys(map(repr, values))
    return {name: float(i) for i, name in enumerate(names)}, "named"
  low, high = min(numbers), max(numbers)
  wide = low > 0 and high >= 8 * low
  return {repr(v): float(v) for v in values}, "log" if wide else "linear"


def _ticks(
  axes: Any, values: Sequence[Any], place: Mapping[str, float], scale: str
) -> None:
  """Puts ticks where the values are, as they were written."""
  if scale == "log":
    axes.set_xscale("log")
  labels = {place[repr(v)]: str(v) for v in values}
  axes.set_xticks(list(labels), labels=list(labels.values()))
  axes.minorticks_off()


def _last(name: str) -> str:
  return name.split(".")[-1]
