"""What pictures of studies share: bars, rankings, labels."""

import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.core.stats import Mean
from research.training.reports import plots


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


def bar_panels(
  path: pathlib.Path,
  title: str,
  panels: Mapping[str, Mapping[str, Mean]],
  size: tuple[float, float],
) -> None:
  """Saves a picture of panels beside each other, bars in each."""
  drawn = plots.figure(*size)
  (places,) = drawn.subplots(1, len(panels), squeeze=False)
  for axes, (label, found) in zip(places, panels.items(), strict=True):
    bars(axes, found, label)
  drawn.suptitle(title)
  plots.save(drawn, path)


def ranking(
  axes: Any, found: Mapping[str, Mean], styles: Mapping[str, Mapping[str, Any]]
) -> None:
  """Draws names under each other, the last on top, with their intervals."""
  for place, (name, m) in enumerate(found.items()):
    (half,) = halves([m])
    axes.errorbar(m.value, place, xerr=half, **styles[name])
  axes.set_yticks(range(len(found)), list(found), fontsize=8)
  axes.grid(alpha=0.3)


def label_points(
  axes: Any, points: Mapping[str, tuple[float, float]], size: int = 7
) -> None:
  """Writes names beside their points: inside of the frame, on no other name.

  Where there is no room for a name, it stands on another one. Layout, scales
  and limits have to be final: see `Figure.draw_without_rendering`.
  """
  frame, limits = axes.get_window_extent(), (axes.get_xlim(), axes.get_ylim())
  taken: list[Any] = []
  for name, point in points.items():
    inside = []
    for dx, dy in itertools.product((4, -4), (4, -4, 12, -12)):
      text = axes.annotate(
        name,
        point,
        (dx, dy),
        textcoords="offset points",
        ha="left" if dx > 0 else "right",
        va="bottom" if dy > 0 else "top",
        fontsize=size,
      )
      box = text.get_window_extent()
      text.remove()
      if all(map(frame.contains, *zip(box.min, box.max, strict=True))):
        inside.append((sum(map(box.overlaps, taken)), len(inside), text, box))
    if inside:
      _, _, text, box = min(inside)
      axes.add_artist(text)
      taken.append(box)
  axes.set(xlim=limits[0], ylim=limits[1])
