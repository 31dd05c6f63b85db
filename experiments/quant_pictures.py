"""Pictures of quantized models: what is lost against bits."""

import itertools
import pathlib
from collections.abc import Mapping
from typing import Any

from research.training import plots

Rows = Mapping[str, Mapping[str, Any]]


def pareto(rows: Rows, picture: pathlib.Path, title: str) -> None:
  """Draws divergence against true bits a weight; none below is the front.

  Args:
    rows: as `experiments.quant_study` measures them.
    picture: the PNG.
    title: above it.
  """
  good = [
    r for r in rows.values() if "failed" not in r and r["bits_per_weight"]
  ]
  drawn = plots.figure(9, 6)
  axes = drawn.add_subplot()
  groups = list(dict.fromkeys(r["group"] for r in good))
  markers = itertools.cycle("os^Dv*PX")
  for group, color, marker in zip(
    groups, itertools.cycle(plots.COLORS), markers, strict=False
  ):
    mine = [r for r in good if r["group"] == group]
    axes.errorbar(
      [r["bits_per_weight"] for r in mine],
      [r["kl"] for r in mine],
      yerr=[r["kl_se"] or 0 for r in mine],
      fmt=marker,
      color=color,
      capsize=2,
      label=group,
    )
  for r in good:
    axes.annotate(
      r["row"],
      (r["bits_per_weight"], r["kl"]),
      (4, 3),
      textcoords="offset points",
      fontsize=6,
    )
  best = front(good)
  axes.plot(
    [r["bits_per_weight"] for r in best],
    [r["kl"] for r in best],
    color="0.6",
    linewidth=0.8,
    zorder=0,
  )
  for low, high in ((3.25, 3.5), (4.25, 4.5)):
    axes.axvspan(low, high, color="0.93", zorder=-1)
  axes.set(
    xlabel="bits a weight, everything counted",
    ylabel="KL(base || quantized), nats a token",
    yscale="log",
    title=title,
  )
  axes.legend(frameon=False, fontsize=8)
  axes.grid(alpha=0.3)
  plots.save(drawn, picture)


def front(rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """Returns the rows that none beats in both bits and divergence."""
  ordered = sorted(rows, key=lambda r: (r["bits_per_weight"], r["kl"]))
  kept: list[Mapping[str, Any]] = []
  for row in ordered:
    if not kept or row["kl"] < kept[-1]["kl"]:
      kept.append(row)
  return kept
