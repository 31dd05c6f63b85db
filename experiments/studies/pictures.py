"""What pictures of studies share: curves over seeds, bars, rankings, labels."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.core.stats import Mean
from research.training.reports import plots
from research.typing import Float

GREY = "0.65"
"""Of what has no colour of its own."""


def colors(names: Sequence[str]) -> dict[str, str]:
  """Returns a colour for each name, none twice: grey once they are used up."""
  own = dict(zip(names, plots.COLORS, strict=False))
  return {name: own.get(name, GREY) for name in names}


def spread(
  axes: Any, x: Any, runs: Float[Any, "S T"], label: str | None, style: Any
) -> None:
  """Draws the mean over seeds, and their range."""
  runs = np.asarray(runs, float)
  axes.plot(x, runs.mean(0), marker="o", markersize=3, label=label, **style)
  axes.fill_between(
    x, runs.min(0), runs.max(0), alpha=0.15, color=style["color"]
  )


def means(
  axes: Any, x: Any, found: Sequence[Mean], label: str, style: Any
) -> None:
  """Draws means, and their 95% intervals."""
  y = np.array([m.value for m in found])
  half = np.array(halves(found))
  axes.plot(x, y, marker="o", markersize=3, label=label, **style)
  axes.fill_between(x, y - half, y + half, alpha=0.15, color=style["color"])


def halves(found: Sequence[Mean]) -> list[float]:
  """Returns halves of intervals; 0 for those of one seed, which have none."""
  return [m.half if math.isfinite(m.half) else 0.0 for m in found]


def bars(axes: Any, found: Mapping[str, Mean], label: str) -> None:
  """Draws a bar a name, the first on top, with its interval."""
  axes.barh(
    list(found),
    [m.value for m in found.values()],
    xerr=halves(list(found.values())),
    color=plots.COLORS[0],
    capsize=2,
  )
  axes.invert_yaxis()
  axes.set(xlabel=label)


def ranking(
  axes: Any, found: Mapping[str, Mean], styles: Mapping[str, Mapping[str, Any]]
) -> None:
  """Draws names under each other, the last on top, with their intervals.

  Args:
    axes: where.
    found: by name, in their order from below.
    styles: by name, of `errorbar`.
  """
  for place, (name, m) in enumerate(found.items()):
    (half,) = halves([m])
    axes.errorbar(m.value, place, xerr=half, **styles[name])
  axes.set_yticks(range(len(found)), list(found), fontsize=8)
  axes.grid(alpha=0.3)


def label_points(
  axes: Any, points: Mapping[str, tuple[float, float]], size: int = 7
) -> None:
  """Writes names beside their points, towards the middle of the frame.

  A name in the right half stands left of its point, so that none crosses the
  frame. Scales and limits of the axes are those of before.
  """
  x_limits, y_limits = axes.get_xlim(), axes.get_ylim()
  for name, point in points.items():
    across, up = axes.transAxes.inverted().transform(
      axes.transData.transform(point)
    )
    right, top = across > 0.5, up > 0.9
    axes.annotate(
      name,
      point,
      (-4 if right else 4, -4 if top else 4),
      textcoords="offset points",
      ha="right" if right else "left",
      va="top" if top else "bottom",
      fontsize=size,
    )
  axes.set(xlim=x_limits, ylim=y_limits)
