"""Plot that compares runs: loss, throughput, learning rate, wall time."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from research.training.reports import plots
from research.training.reports.goodput import BUCKETS

MARKERS = ("o", "s", "^", "D", "v")
"""Markers of evaluations: `validation`, then other losses."""

LEARNING_RATE = "train/learning_rate"
"""Metric of the rate, and beginning of those of groups of parameters."""

BUCKET_COLORS: Mapping[str, str] = {
  "init": "#999999",
  "compile": "#E69F00",
  "restore": "#F0E442",
  "data": "#D55E00",
  "step": "#009E73",
  "save": "#56B4E9",
  "evaluate": "#0072B2",
  "lost": "#000000",
  "other": "#DDDDDD",
}
"""Okabe and Ito's colours, and greys; productive time is green."""

DARK_BUCKETS = ("step", "data", "evaluate", "lost")
"""Buckets with a dark colour, which need white text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curves:
  """The data of a run to plot.

  Attributes:
    seconds: bucket -> wall seconds; empty if not recorded.
    fraction: its goodput, or None.
  """

  name: str
  records: Sequence[Mapping[str, Any]]
  seconds: Mapping[str, float]
  fraction: float | None


def compare(runs: Sequence[Curves], picture: str | os.PathLike) -> None:
  """Plots several runs in the same axes to a PNG; one colour per run."""
  bars = 1.0 + 0.32 * len(runs)
  drawn = plots.figure(12, 7.6 + bars)
  grid = drawn.add_gridspec(3, 2, height_ratios=[4.4, 3.2, bars])
  _loss(drawn.add_subplot(grid[0, :]), runs)
  _throughput(drawn.add_subplot(grid[1, 0]), runs)
  _learning_rate(drawn.add_subplot(grid[1, 1]), runs)
  _time(drawn.add_subplot(grid[2, :]), runs)
  empty = drawn.axes[0]  # lines without points, for the legend alone
  drawn.legend(
    [
      empty.plot([], [], linewidth=2.5, **plots.style(number))[0]
      for number in range(len(runs))
    ],
    [run.name for run in runs],
    loc="outside upper center",
    ncols=max(1, min(4, len(runs), 120 // max(len(r.name) for r in runs))),
    frameon=False,
  )
  plots.save(drawn, picture)


def series(
  records: Sequence[Mapping[str, Any]], name: str
) -> tuple[list[int], list[float]]:
  """Returns the steps at which a metric was recorded, and its values."""
  points = [(r["step"], plots.metric_value(r, name)) for r in records]
  points = [(step, value) for step, value in points if value is not None]
  return [step for step, _ in points], [value for _, value in points]


def _loss(axes: Any, runs: Sequence[Curves]) -> None:
  others = {part: None for run in runs for part in _evaluated(run.records)}
  for number, run in enumerate(runs):
    look = plots.style(number)
    steps, losses = series(run.records, "train/loss")
    axes.plot(steps, losses, color=look["color"], alpha=0.2, linewidth=0.8)
    axes.plot(steps, plots.smooth(losses), linewidth=1.8, **look)
    for part, marker in zip(others, MARKERS, strict=False):
      at, values = series(run.records, f"{part}/loss")
      axes.plot(
        *(at, values, marker),
        color=look["color"],
        markeredgecolor="black",
        markersize=6,
      )
  marks = "".join(
    f", {marker} {part}"
    for part, marker in zip(others, ("●", "■", "▲", "◆", "▼"), strict=False)
  )
  axes.set(title=f"Loss (lines: train, smoothed{marks})", xlabel="step")
  axes.set_ylabel("nats per token")
  axes.grid(alpha=0.3)


def _evaluated(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
  for record in records:
    for name in record:
      part, _, what = name.rpartition("/")
      if what == "loss" and part != "train":
        yield part


def _throughput(axes: Any, runs: Sequence[Curves]) -> None:
  for number, run in enumerate(runs):
    look = plots.style(number)
    timed = [r for r in run.records if r.get("train/seconds")]
    rates = [(r.get("train/tokens") or 0) / r["train/seconds"] for r in timed]
    steps = [r["step"] for r in timed]
    axes.plot(steps, rates, color=look["color"], alpha=0.2, linewidth=0.8)
    axes.plot(steps, plots.smooth(rates), linewidth=1.8, **look)
    slow = [
      (step, rate)
      for step, rate, r in zip(steps, rates, timed, strict=True)
      if r.get("train/slow_step")
    ]
    if slow:
      axes.plot(*zip(*slow, strict=True), "x", color=look["color"])
  axes.set(title="Throughput (×: slow steps)", xlabel="step")
  axes.set_ylabel("tokens per second")
  axes.set_ylim(bottom=0)
  axes.grid(alpha=0.3)


def _learning_rate(axes: Any, runs: Sequence[Curves]) -> None:
  for number, run in enumerate(runs):
    rates = {n for r in run.records for n in r if n.startswith(LEARNING_RATE)}
    for name in sorted(rates):
      axes.plot(
        *series(run.records, name), linewidth=1.8, **plots.style(number)
      )
  axes.set(title="Learning rate", xlabel="step")
  axes.set_ylim(bottom=0)
  axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
  axes.grid(alpha=0.3)


def _time(axes: Any, runs: Sequence[Curves]) -> None:
  """Draws one bar per run: each bucket's share of the wall time."""
  for row, run in enumerate(runs):
    wall, left = sum(run.seconds.values()), 0.0
    for bucket in BUCKETS if wall else ():
      share = 100 * run.seconds.get(bucket, 0.0) / wall
      axes.barh(row, share, left=left, color=BUCKET_COLORS[bucket], height=0.7)
      if share >= 4:
        color = "white" if bucket in DARK_BUCKETS else "black"
        place = {"ha": "center", "va": "center", "fontsize": 8}
        axes.text(left + share / 2, row, f"{share:.0f}%", color=color, **place)
      left += share
    text = "time not recorded"
    if wall:
      known = "?" if run.fraction is None else f"{run.fraction:.0%}"
      text = f" {known} of {_duration(wall)}"
    axes.text(left, row, text, va="center", fontsize=9)
  axes.set_yticks(range(len(runs)), [run.name for run in runs])
  axes.invert_yaxis()
  axes.set(title="Wall time, and goodput: steps that counted", xlim=(0, 112))
  axes.set_xticks([])
  axes.spines[["top", "right", "bottom"]].set_visible(False)
  boxes = [axes.barh(0, 0, color=BUCKET_COLORS[bucket]) for bucket in BUCKETS]
  axes.legend(
    boxes,
    ["step (counts)" if b == "step" else b for b in BUCKETS],
    loc="upper center",
    bbox_to_anchor=(0.45, -0.02),
    ncols=len(BUCKETS),
    frameon=False,
    handlelength=1,
    columnspacing=1.2,
  )


def _duration(seconds: float) -> str:
  for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
    if seconds >= 2 * size:
      return f"{seconds / size:.1f} {unit}"
  return f"{seconds:.0f} s"
