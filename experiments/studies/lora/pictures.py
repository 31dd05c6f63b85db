"""Pictures of LoRA's studies: losses against rates, gains against costs.

Rows are those of `lr_grid.sweep`.
"""

import itertools
import pathlib

import numpy as np

from experiments.core.stats import mean
from experiments.studies import pictures
from experiments.studies.lora import lora_verdicts as verdicts
from experiments.studies.protocol import Rows
from research.training.reports import plots


def sweep(rows: Rows, picture: pathlib.Path, title: str) -> None:
  """Draws losses against rates, and every arm at its best rate.

  An arm has the same colour on both sides; those after the first few are grey.
  """
  drawn = plots.figure(12, max(4.5, 0.24 * len(rows) + 1.5))
  left, right = drawn.subplots(1, 2)
  colors = pictures.colors(list(rows))
  for name, row in rows.items():
    grey = colors[name] == pictures.GREY
    pictures.spread(
      left,
      [10 ** (k / 2) for k in row["ks"]],
      np.array(row["heldout"], float).T,
      None if grey else name,
      {"color": colors[name], "linewidth": 0.7 if grey else 1.5},
    )
  found = {n: mean(verdicts.at_best(r)) for n, r in rows.items()}
  best = min(np.nanmin(np.array(r["heldout"], float)) for r in rows.values())
  worst = max(m.value for m in found.values())
  left.set(
    xscale="log",
    xlabel="learning rate",
    ylabel="held-out loss",
    ylim=(best - 0.1 * (worst - best), worst + 1.5 * (worst - best)),
    title=title,
  )
  left.legend(frameon=False, fontsize=8)
  left.grid(alpha=0.3)
  order = sorted(found, key=lambda n: found[n].value, reverse=True)
  styles = {
    n: {"fmt": "o", "color": c, "capsize": 3} for n, c in colors.items()
  }
  pictures.ranking(right, {n: found[n] for n in order}, styles)
  right.set(xlabel="held-out loss at the best rate, 95% over seeds")
  plots.save(drawn, picture)


def tradeoff(rows: Rows, picture: pathlib.Path) -> None:
  """Draws the gain against parameters, and against what was forgotten."""
  drawn = plots.figure(12, 4.8)
  left, right = drawn.subplots(1, 2)
  whole = rows["full"]["trained"]
  gain = {n: verdicts.recovered(rows, n) for n in rows}
  share = {n: (r["trained"] / whole, gain[n]) for n, r in rows.items()}
  forgot = {
    n: (mean(verdicts.at_best(r, "known")).value, gain[n])
    for n, r in rows.items()
  }
  groups = list(dict.fromkeys(r["group"] for r in rows.values()))
  colors = pictures.colors(groups)
  for group, marker in zip(groups, itertools.cycle("os^Dv*"), strict=False):
    names = [n for n, r in rows.items() if r["group"] == group]
    style = dict(marker=marker, linestyle="none", color=colors[group])
    for axes, points in ((left, share), (right, forgot)):
      x, y = zip(*(points[n] for n in names), strict=True)
      axes.plot(x, y, label=group, **style)
  left.axhline(1, color="0.6", linewidth=0.8)
  left.set(
    xscale="log",
    xlabel="trained parameters, share of all",
    ylabel="share of full training's gain",
  )
  right.set(xlabel="loss on what was known before", ylabel="the same")
  left.legend(frameon=False, fontsize=8, loc="lower right")
  drawn.draw_without_rendering()  # limits and frames are final from here on
  for axes, points in ((left, share), (right, forgot)):
    axes.grid(alpha=0.3)
    pictures.label_points(axes, points)
  plots.save(drawn, picture)
