"""Pictures of packed models: what is lost against bits and bytes."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.core.stats import Mean
from experiments.studies import pictures
from experiments.studies.protocol import Lines, Rows
from experiments.studies.quant import bands
from research.training.reports import plots


def pareto(rows: Rows, picture: pathlib.Path, title: str) -> None:
  """Draws `front_and_ranking` into a PNG."""
  plots.save(front_and_ranking(rows, title), picture)


def front_and_ranking(rows: Rows, title: str) -> Any:
  """Returns a figure: divergence against true bits, and each band's ranking.

  Args:
    rows: as `experiments.studies.quant.quant_study` measures them.
    title: above it.
  """
  good = [
    r for r in rows.values() if "failed" not in r and r["bits_per_weight"]
  ]
  groups = list(dict.fromkeys(r["group"] for r in good))
  drawn = plots.figure(13, max(5, 0.2 * len(good) + 1))
  left, right = drawn.subplots(1, 2, width_ratios=(3, 2))
  for group in groups:
    mine = [r for r in good if r["group"] == group]
    left.errorbar(
      [r["bits_per_weight"] for r in mine],
      [r["kl"] for r in mine],
      yerr=[r["kl_se"] or 0 for r in mine],
      label=group,
      **_style(groups, group),
    )
  best = front(good)
  points = {r["row"]: (r["bits_per_weight"], r["kl"]) for r in best}
  left.plot(*zip(*points.values(), strict=True), color="0.6", lw=0.8, zorder=0)
  for low, high in bands.BANDS:
    left.axvspan(low, high, color="0.93", zorder=-1)
  left.set(
    xlabel="bits a weight, everything counted",
    ylabel="KL(base || quantized), nats a token",
    yscale="log",
    title=title,
  )
  left.legend(frameon=False, fontsize=8)
  left.grid(alpha=0.3)
  _ranking(right, good, groups)
  drawn.draw_without_rendering()  # limits and frames are final from here on
  pictures.label_points(left, points)
  return drawn


def _style(groups: Sequence[str], group: str) -> dict[str, Any]:
  i = groups.index(group)
  color = plots.COLORS[i % len(plots.COLORS)]
  return dict(fmt="os^Dv*PX"[i % 8], color=color, capsize=2, markersize=5)


def _ranking(axes: Any, rows: Sequence[Any], groups: Sequence[str]) -> None:
  """Draws the rows of each band under each other, the best on top."""
  found: dict[str, Mean] = {}
  styles: dict[str, Mapping[str, Any]] = {}
  for limits in bands.BANDS[::-1]:
    some = [r for r in rows if bands.band(r["bits_per_weight"]) == limits]
    for r in sorted(some, key=lambda r: -r["kl"]):
      name = f"{r['row']}  ({r['bits_per_weight']:.2f})"
      found[name] = Mean(r["kl"], r["kl_se"] or 0.0)
      styles[name] = _style(groups, r["group"])
    axes.axhline(len(found) - 0.5, color="0.8", linewidth=0.8)
  pictures.ranking(axes, found, styles)
  axes.set(xscale="log", xlabel="KL, by band", title="at equal bits")
  axes.xaxis.set_minor_formatter("")


def front(rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """Returns the rows that none beats in both bits and divergence."""
  ordered = sorted(rows, key=lambda r: (r["bits_per_weight"], r["kl"]))
  kept: list[Mapping[str, Any]] = []
  for row in ordered:
    if not kept or row["kl"] < kept[-1]["kl"]:
      kept.append(row)
  return kept


def ladder(lines: Lines, picture: pathlib.Path, title: str) -> None:
  """Draws loss against bytes, a line a way to pack a model of any width.

  Args:
    lines: as `experiments.studies.quant.quant_ladder.table` makes them.
    picture: the PNG.
    title: above it.
  """
  drawn = plots.figure(8, 5)
  axes = drawn.add_subplot()
  names = list(dict.fromkeys(x["row"] for x in lines))
  for i, name in enumerate(names):
    mine = [x for x in lines if x["row"] == name]
    losses = [x["loss"] for x in mine]
    pictures.means(axes, [x["kB"] for x in mine], losses, name, plots.style(i))
  axes.set(
    xscale="log",
    xlabel="kB, all arrays",
    ylabel="loss on unseen text, nats a token",
    title=title,
  )
  axes.legend(frameon=False, fontsize=8)
  axes.grid(alpha=0.3, which="both")
  plots.save(drawn, picture)
