"""Pictures of searches: accuracy by budget and by FLOPs, and the ledger."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.searching.pool import Searched
from experiments.studies.pictures import label_points
from research.search.protocols import Curve, Point
from research.training.reports.plots import COLORS


def budgets(
  ks: Sequence[int], curves: Mapping[str, Sequence[Sequence[float]]]
) -> Any:
  """Returns a figure of accuracies by number of samples, with intervals.

  Args:
    curves: by name, (value, low, high) of each number, as in the `estimates`
      of a search.
  """
  figure, axes = plt.subplots(figsize=(8, 4))
  for (name, rows), color in zip(curves.items(), COLORS, strict=False):
    value, low, high = 100 * np.array(rows).T
    axes.plot(ks, value, "o-", color=color, markersize=4, label=name)
    axes.fill_between(ks, low, high, color=color, alpha=0.12, lw=0)
  axes.set_xscale("log", base=2)
  axes.set_xticks(ks, ks)
  axes.set(xlabel="samples of a problem", ylabel="right, %", ylim=(0, None))
  # Outside: curves may run anywhere.
  axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
  return figure


def costs(pools: Mapping[str, Sequence[Searched]]) -> Any:
  """Returns a figure of what searches cost a problem, by what it went to."""
  figure, axes = plt.subplots(figsize=(8, 0.45 * len(pools) + 1.1))
  parts = {
    "policy, prompt": lambda x: x.prompt_ledger.flops_policy,
    "policy, tokens": lambda x: (
      x.ledger.flops_policy - x.prompt_ledger.flops_policy
    ),
    "verifier": lambda x: x.ledger.flops_verifier,
  }
  left = np.zeros(len(pools))
  for (name, flops), color in zip(parts.items(), COLORS, strict=False):
    width = np.array([np.mean([*map(flops, x)]) for x in pools.values()]) / 1e6
    axes.barh(list(pools), width, left=left, color=color, label=name)
    left += width
  axes.invert_yaxis()
  axes.set(xlabel="MFLOP a problem")
  axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
  return figure


def against_flops(curves: Sequence[Curve], points: Mapping[str, Point]) -> Any:
  """Returns a figure of accuracies against FLOPs."""
  figure, axes = plt.subplots(figsize=(9, 5))
  for i, curve in enumerate(curves):
    axes.plot(
      np.array(curve.costs) / 1e6,
      100 * np.array(curve.accuracies),
      ("-", "--")[i % 2],
      color=COLORS[i // 2],
      label=curve.name,
    )
  places = {
    name: (p.cost / 1e6, 100 * p.accuracy) for name, p in points.items()
  }
  axes.plot(*zip(*places.values(), strict=True), "o", color="k", markersize=4)
  axes.set(
    xlabel="MFLOP a problem, verifier included", ylabel="right, %", xscale="log"
  )
  axes.grid(alpha=0.3)
  axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
  figure.draw_without_rendering()  # limits are final from here on
  label_points(axes, places)
  return figure
