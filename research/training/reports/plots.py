"""Loss curve of a run, and plotting helpers."""

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
"""The palette of Okabe and Ito, which is safe for colour blindness."""

LINE_STYLES = ("-", "--", ":", "-.")
"""Line styles; the next one is used once all colours are used up."""

Point = tuple[int, float, str]
"""A marked point: (step, loss in nats per token, label)."""


def loss_curve(
  metrics: str | os.PathLike,
  picture: str | os.PathLike,
  *,
  title: str,
  points: Sequence[Point] = (),
) -> None:
  """Plots training and evaluation loss over steps to a PNG.

  Args:
    metrics: a metrics.jsonl; `train/loss` is drawn as a curve, every other
      `<part>/loss` as a line with markers.
    points: additional points to mark, e.g. held-out loss before and after.

  Raises:
    UserError: the file contains no losses, or the PNG cannot be written.
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
  """Returns a metric of a record; None if missing or a mean over no weight."""
  part, _, what = name.rpartition("/")
  empty = record.get(f"{part}/weight") == 0
  return None if what == "loss" and empty else record.get(name)


def figure(width: float | int, height: float | int) -> Any:
  """Returns an empty matplotlib figure; sizes in inches."""
  # Without pyplot, there is no global state and no display. Imported here to
  # keep start-up fast.
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
  """Returns the colour and line style of curve `number`."""
  turn, color = divmod(number, len(COLORS))
  return {
    "color": COLORS[color],
    "linestyle": LINE_STYLES[turn % len(LINE_STYLES)],
  }


def smooth(values: Sequence[float], share: float = 0.1) -> list[float]:
  """Returns the running mean over a window of `share` of all values."""
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
  """Returns `{part: (steps, losses)}` for each part of a run with a loss."""
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
