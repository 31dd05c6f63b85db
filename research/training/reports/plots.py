"""Pictures of a run, and what all pictures share."""

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from research.training.reports.metrics import read_jsonl
from research.typing import UserError

COLORS = (
  "#0072B2",
  "#E69F00",
  "#009E73",
  "#CC79A7",
  "#56B4E9",
  "#D55E00",
  "#000000",
)
"""Of Okabe and Ito, told apart with every kind of colour vision."""

LINE_STYLES = ("-", "--", ":", "-.")
"""Once the colours are used up, in the order of use."""

Point = tuple[int, float, str]
"""A marked point: step, loss in nats per token, and what it is."""


def loss_curve(
  metrics: str | os.PathLike,
  picture: str | os.PathLike,
  *,
  title: str,
  points: Sequence[Point] = (),
) -> None:
  """Draws training and evaluation loss over steps into a PNG.

  Args:
    metrics: a metrics.jsonl; `train/loss` is the curve, every other
      `<part>/loss` a line of marked points.
    picture: the PNG.
    title: above the picture.
    points: further points to mark, e.g. held-out loss before and after.
  """
  curves = _curves(read_jsonl(metrics))
  if not curves:
    raise UserError(f"{metrics}: no losses to draw. Expected a finished run.")
  drawn = figure(7, 4.2)
  axes = drawn.add_subplot()
  colors = itertools.cycle(COLORS[1:])  # the first is training
  for part, (steps, losses) in curves.items():
    if part == "train":
      axes.plot(steps, losses, color="0.75", linewidth=0.8, label="train, raw")
      axes.plot(steps, smooth(losses), color=COLORS[0], label="train, smoothed")
    else:
      axes.plot(
        steps, losses, "o-", markersize=4, label=part, color=next(colors)
      )
  for step, loss, label in points:
    text = f"{label}: {loss:.3f}"
    axes.plot(
      [step], [loss], "*", markersize=11, color=next(colors), label=text
    )
  axes.set(xlabel="step (updates)", ylabel="loss (nats per token)", title=title)
  axes.grid(alpha=0.3)
  axes.legend(frameon=False)
  save(drawn, picture)


def metric_value(record: Mapping[str, Any], name: str) -> Any:
  """Returns a metric, or None: a mean over nothing is 0, and no measurement."""
  part, _, what = name.rpartition("/")
  empty = record.get(f"{part}/weight") == 0
  return None if what == "loss" and empty else record.get(name)


def figure(width: float | int, height: float | int) -> Any:
  """Returns an empty matplotlib figure of so many inches."""
  # Drawn without pyplot: no global state, no display. Imported when needed: a
  # run draws at its end and shall start soon.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  made = Figure(figsize=(width, height), dpi=130, layout="constrained")
  FigureCanvasAgg(made)
  return made


def save(drawn: Any, picture: str | os.PathLike) -> None:
  """Writes a figure as a PNG."""
  try:
    drawn.savefig(picture)
  except OSError as error:
    raise UserError(
      f"{picture}: cannot be written ({error.strerror})."
    ) from error


def style(number: int) -> dict[str, Any]:
  """Returns the colour and the kind of line of the number-th of many."""
  turn, color = divmod(number, len(COLORS))
  return {
    "color": COLORS[color],
    "linestyle": LINE_STYLES[turn % len(LINE_STYLES)],
  }


def smooth(values: Sequence[float], share: float = 0.1) -> list[float]:
  """Returns the running mean over the last `share` of all values."""
  window = max(1, round(len(values) * share))
  sums = list(itertools.accumulate(values, initial=0.0))
  ends = range(1, len(values) + 1)
  starts = (max(0, end - window) for end in ends)
  return [
    (sums[end] - sums[start]) / (end - start)
    for start, end in zip(starts, ends, strict=True)
  ]


def _curves(
  records: Sequence[Mapping[str, Any]],
) -> dict[str, tuple[list[int], list[float]]]:
  """Returns steps and losses of each part of the run that has a loss."""
  curves: dict[str, tuple[list[int], list[float]]] = {}
  for record in records:
    for name in record:
      part, _, what = name.rpartition("/")
      value = metric_value(record, name)
      if what == "loss" and value is not None:
        steps, losses = curves.setdefault(part, ([], []))
        steps.append(record["step"])
        losses.append(value)
  return curves
