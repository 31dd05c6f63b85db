"""Pictures of a run."""

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from research.training.metrics import read_jsonl
from research.typing import UserError

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
  # Drawn without pyplot: no global state, no display.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  curves = _curves(read_jsonl(metrics))
  if not curves:
    raise UserError(f"{metrics}: no losses to draw. Expected a finished run.")
  figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  colors = (f"C{i}" for i in itertools.count(1))  # C0 is training
  for part, (steps, losses) in curves.items():
    if part == "train":
      axes.plot(steps, losses, color="0.75", linewidth=0.8, label="train, raw")
      axes.plot(steps, smooth(losses), color="C0", label="train, smoothed")
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
  try:
    figure.savefig(picture)
  except OSError as error:
    raise UserError(
      f"{picture}: cannot be written ({error.strerror})."
    ) from error


def smooth(values: Sequence[float], share: float = 0.1) -> list[float]:
  """Returns the running mean over the last `share` of all values."""
  window = max(1, round(len(values) * share))
  return [
    sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window)
    for i in range(len(values))
  ]


def _curves(
  records: Sequence[Mapping[str, Any]],
) -> dict[str, tuple[list[int], list[float]]]:
  """Returns steps and losses of each part of the run that has a loss."""
  curves: dict[str, tuple[list[int], list[float]]] = {}
  for record in records:
    for name, value in record.items():
      part, _, what = name.rpartition("/")
      if what == "loss" and value is not None:
        steps, losses = curves.setdefault(part, ([], []))
        steps.append(record["step"])
        losses.append(value)
  return curves
