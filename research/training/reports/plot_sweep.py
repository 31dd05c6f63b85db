"""Plot of a sweep: a metric over one of the swept parameters."""

import collections
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from research.training.reports import plots

Group = tuple[Mapping[str, Any], Sequence[float]]
"""Parameters that a group of runs shares, and the metric of each run (seed)."""

MAX_INSIDE_LEGEND = 8
"""Up to this number of lines, the legend is inside of the axes."""


def plot_sweep(
  groups: Sequence[Group],
  picture: str | os.PathLike,
  *,
  axis: str,
  metric: str,
  title: str,
) -> None:
  """Plots a metric over one parameter of a sweep to a PNG.

  One line for each combination of the other parameters, through the means over
  seeds. Each run is a dot; the band spans minimum to maximum.

  Args:
    axis: parameter on the x axis; groups without it are left out.
  """
  here = [(unit, values) for unit, values in groups if axis in unit]
  place, scale = _places([unit[axis] for unit, _ in here])
  names = _names({k for unit, _ in here for k in unit} - {axis})
  lines: dict[str, list[tuple[float, Sequence[float]]]] = {}
  for unit, values in here:
    label = ", ".join(f"{names[k]}={v}" for k, v in unit.items() if k != axis)
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
  """Returns the x position of each value, and the type of axis.

  Numbers use a linear axis, or a logarithmic one if they span a factor of
  eight. Other values are equally spaced, in order of appearance.
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
  """Puts a tick at each value, labelled with the value as written."""
  if scale == "log":
    axes.set_xscale("log")
  labels = {place[repr(v)]: str(v) for v in values}
  axes.set_xticks(list(labels), labels=list(labels.values()))
  axes.minorticks_off()


def _names(bindings: Iterable[str]) -> dict[str, str]:
  """Returns each binding's last part, or all of it where others share that."""
  last = {name: name.split(".")[-1] for name in bindings}
  shared = collections.Counter(last.values())
  return {k: k if shared[part] > 1 else part for k, part in last.items()}
