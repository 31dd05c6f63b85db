"""A picture of packed models: what is lost against bits and bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.core.stats import Mean
from experiments.studies import pictures
from research.training.reports import plots

BANDS = ((4.25, 4.5), (3.25, 3.5))
"""Bits a weight within which rows compete, both ends included."""


def band(bits: float) -> tuple[float, float] | None:
  """Returns the band that a number of bits, to a hundredth, lies in."""
  return next((x for x in BANDS if x[0] <= round(bits, 2) <= x[1]), None)


def front_and_ranking(rows: Sequence[Mapping[str, Any]], title: str) -> Any:
  """Returns a figure: divergence against true bits, and each band's ranking.

  Args:
    rows: as `quant_story.measured` returns them.
  """
  groups = list(dict.fromkeys(r["group"] for r in rows))
  drawn = plots.figure(13, max(5, 0.2 * len(rows) + 1))
  left, right = drawn.subplots(1, 2, width_ratios=(3, 2))
  for group in groups:
    mine = [r for r in rows if r["group"] == group]
    left.errorbar(
      [r["bits_per_weight"] for r in mine],
      [r["kl"] for r in mine],
      yerr=[r["kl_se"] or 0 for r in mine],
      label=group,
      **_style(groups, group),
    )
  best = front(rows)
  points = {r["row"]: (r["bits_per_weight"], r["kl"]) for r in best}
  left.plot(*zip(*points.values(), strict=True), color="0.6", lw=0.8, zorder=0)
  for low, high in BANDS:
    left.axvspan(low, high, color="0.93", zorder=-1)
  left.set(
    xlabel="bits a weight, everything counted",
    ylabel="KL(base || quantized), nats a token",
    yscale="log",
    title=title,
  )
  left.legend(frameon=False, fontsize=8)
  left.grid(alpha=0.3)
  _ranking(right, rows, groups)
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
  for limits in BANDS[::-1]:
    some = [r for r in rows if band(r["bits_per_weight"]) == limits]
    for r in sorted(some, key=lambda r: -r["kl"]):
      name = f"{r['row']}  ({r['bits_per_weight']:.2f})"
      found[name] = Mean(r["kl"], r["kl_se"] or 0.0)
      styles[name] = _style(groups, r["group"])
    axes.axhline(len(found) - 0.5, color="0.8", linewidth=0.8)
  pictures.ranking(axes, found, styles)
  axes.set(xscale="log", xlabel="KL, by band", title="at equal bits")
  axes.xaxis.set_minor_formatter("")


def front(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """Returns the rows that none beats in both bits and divergence."""
  ordered = sorted(rows, key=lambda r: (r["bits_per_weight"], r["kl"]))
  kept: list[Mapping[str, Any]] = []
  for row in ordered:
    if not kept or row["kl"] < kept[-1]["kl"]:
      kept.append(row)
  return kept
