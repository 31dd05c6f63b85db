"""Pictures of a study: losses against rates, and what was learned at what cost.

Rows are those of `population.sweep`.
"""

import itertools
import pathlib
from typing import Any

import numpy as np

from experiments.studies.lora import lora_verdicts as verdicts
from research.training.reports import plots

SHOWN = 9
"""Arms whose curves are told apart."""


def sweep(rows: verdicts.Rows, picture: pathlib.Path, title: str) -> None:
  """Draws losses against rates, and every arm at its best rate."""
  drawn = plots.figure(12, max(4.5, 0.24 * len(rows) + 1.5))
  left, right = drawn.subplots(1, 2)
  shown = list(rows)[:SHOWN]
  for i, name in enumerate(shown):
    row = rows[name]
    rates, losses = _curve(row)
    left.plot(
      rates,
      losses.mean(1),
      marker="o",
      markersize=4,
      label=name,
      **plots.style(i),
    )
    low, high = losses.min(1), losses.max(1)
    left.fill_between(
      rates, low, high, alpha=0.15, color=plots.style(i)["color"]
    )
  best = min(np.nanmin(_curve(r)[1]) for r in rows.values())
  worst = max(verdicts.mean(verdicts.at_best(r)).value for r in rows.values())
  left.set(
    xscale="log",
    xlabel="learning rate",
    ylabel="held-out loss",
    ylim=(best - 0.1 * (worst - best), worst + 1.5 * (worst - best)),
    title=title,
  )
  left.legend(frameon=False, fontsize=8)
  left.grid(alpha=0.3)
  _ranking(right, rows)
  plots.save(drawn, picture)


def _curve(row: Any) -> tuple[np.ndarray, np.ndarray]:
  rates = np.array([10 ** (k / 2) for k in row["ks"]])
  return rates, np.array(row["heldout"], float)


def _ranking(axes: Any, rows: verdicts.Rows) -> None:
  """Draws the arms under each other, best on top, with intervals."""
  means = {n: verdicts.mean(verdicts.at_best(r)) for n, r in rows.items()}
  order = sorted(means, key=lambda n: means[n].value, reverse=True)
  groups = list(dict.fromkeys(r["group"] for r in rows.values()))
  for place, name in enumerate(order):
    color = plots.COLORS[groups.index(rows[name]["group"]) % len(plots.COLORS)]
    half = means[name].half if np.isfinite(means[name].half) else 0
    axes.errorbar(
      means[name].value, place, xerr=half, fmt="o", color=color, capsize=3
    )
  axes.set_yticks(range(len(order)), order, fontsize=8)
  axes.set(xlabel="held-out loss at the best rate, 95% over seeds")
  axes.grid(alpha=0.3)


def tradeoff(rows: verdicts.Rows, picture: pathlib.Path) -> None:
  """Draws the gain against parameters, and against what was forgotten."""
  drawn = plots.figure(12, 4.8)
  left, right = drawn.subplots(1, 2)
  groups = list(dict.fromkeys(r["group"] for r in rows.values()))
  for group, marker in zip(groups, itertools.cycle("os^Dv*"), strict=False):
    names = [n for n, r in rows.items() if r["group"] == group]
    color = plots.COLORS[groups.index(group) % len(plots.COLORS)]
    look = dict(marker=marker, linestyle="none", color=color, label=group)
    share = [rows[n]["trained"] / rows["full"]["trained"] for n in names]
    gain = [verdicts.recovered(rows, n) for n in names]
    forgot = [
      verdicts.mean(verdicts.at_best(rows[n], "known")).value for n in names
    ]
    left.plot(share, gain, **look)
    right.plot(forgot, gain, **look)
    for axes, xs in ((left, share), (right, forgot)):
      for x, y, name in zip(xs, gain, names, strict=True):
        axes.annotate(
          name, (x, y), (3, 3), textcoords="offset points", fontsize=6
        )
  left.axhline(1, color="0.6", linewidth=0.8)
  left.set(
    xscale="log",
    xlabel="trained parameters, share of all",
    ylabel="share of full training's gain",
  )
  right.set(xlabel="loss on what was known before", ylabel="the same")
  left.legend(frameon=False, fontsize=8, loc="lower right")
  for axes in (left, right):
    axes.grid(alpha=0.3)
  plots.save(drawn, picture)
