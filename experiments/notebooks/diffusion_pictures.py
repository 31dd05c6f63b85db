"""Pictures of masked diffusion: masks, bounds, a step, quality by steps."""

import dataclasses
import html
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from research.diffusion.sampling import visualize
from research.diffusion.schedule import Schedule
from research.typing import Bool, Float


@dataclasses.dataclass(frozen=True)
class Unmasking:
  """A row while it is filled: a page in a notebook, lines on a screen.

  Attributes:
    pieces: each place's text.
    filled: the step that filled it; -1 for what was given.
  """

  pieces: Sequence[str]
  filled: Sequence[int]

  def __str__(self) -> str:
    moments = [-1, *visualize.calls(self.filled)]
    return "\n".join(
      f"{now + 1:4}  {visualize.frame(self.pieces, self.filled, now)}"
      for now in moments
    )

  def _repr_html_(self) -> str:
    page = html.escape(visualize.page(self.pieces, self.filled))
    return (
      f'<iframe srcdoc="{page}" style="width: 100%; height: 12em; border: 0">'
      "</iframe>"
    )


def masking(
  letters: Sequence[str], times: Sequence[float], masked: Bool[Any, "N T"]
) -> Any:
  """Returns a figure of a row at several times, masks dark."""
  figure, axes = plt.subplots(figsize=(9, 0.35 * len(times) + 0.8))
  axes.imshow(masked, cmap="Greys", vmin=0, vmax=1.3, aspect="auto")
  for i, j in np.argwhere(~np.asarray(masked)):
    axes.text(j, i, letters[j], ha="center", va="center", fontsize=9)
  axes.set_yticks(range(len(times)), [f"t = {t:g}" for t in times])
  axes.set_xticks([])
  return figure


def schedules(chosen: Mapping[str, Schedule]) -> Any:
  """Returns a figure of how much is masked, and of what a mask counts."""
  figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
  t = np.linspace(0.02, 1, 200)
  for name, schedule in chosen.items():
    left.plot(t, schedule.masked(t), label=name)
    right.semilogy(t, np.maximum(schedule.weight(t), 1e-2), label=name)
  left.set(xlabel="t", ylabel="share of masks")
  right.set(xlabel="t", ylabel="what a masked token counts")
  left.legend(frameon=False)
  return figure


def areas(curves: Mapping[str, Float[Any, " T"]], entropy: float) -> Any:
  """Returns a figure of cross-entropy by number of masks; areas are bounds."""
  figure, axes = plt.subplots(figsize=(7, 3.5))
  for name, curve in curves.items():
    counts = range(1, len(curve) + 1)
    label = f"{name}: mean {np.mean(curve):.3f}"
    axes.plot(counts, curve, ".-", label=label)
  axes.axhline(entropy, color="0.6", label=f"entropy: {entropy:.3f}")
  axes.set(xlabel="masked tokens", ylabel="nats a masked token", ylim=(0, None))
  axes.legend(frameon=False)
  return figure


def step(
  before: Sequence[str],
  after: Sequence[str],
  chances: Float[Any, "T V"],
  names: Sequence[str],
) -> Any:
  """Returns a figure of what a model says of each place of a row.

  Args:
    before: letters of the row, masks among them.
    after: letters after a step.
  """
  figure, axes = plt.subplots(figsize=(9, 0.28 * len(names) + 1.2))
  axes.imshow(np.asarray(chances).T, cmap="viridis", vmin=0, vmax=1)
  axes.set_aspect("auto")
  axes.set_yticks(range(len(names)), names)
  axes.set_xticks(range(len(before)), before)
  top = axes.secondary_xaxis("top")
  top.set_xticks(range(len(after)), after)
  axes.set(xlabel="the row; above it, the row after the step")
  return figure


def quality(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
  """Returns a figure of `diffusion_story.by_steps`, for several models."""
  figure, axes = plt.subplots(1, 2, figsize=(10, 3.5))
  for panel, column in zip(axes, ("nats a token", "pairs off"), strict=True):
    for model, lines in rows.items():
      for select in dict.fromkeys(line["places by"] for line in lines):
        chosen = [line for line in lines if line["places by"] == select]
        panel.semilogx(
          [line["steps"] for line in chosen],
          [line[column] for line in chosen],
          "o-",
          base=2,
          label=f"{model}, {select}",
        )
    panel.set(xlabel="steps", ylabel=column)
  axes[1].legend(frameon=False, fontsize=8)
  return figure


def rungs(rows: Sequence[Mapping[str, Any]], entropy: float) -> Any:
  """Returns a figure of `diffusion_story.ladder`."""
  figure, axes = plt.subplots(figsize=(5, 3))
  axes.plot([r["block"] for r in rows], [r["bound"] for r in rows], "o-")
  axes.set_xscale("log", base=2)
  axes.axhline(entropy, color="0.6", label="entropy")
  axes.set(xlabel="tokens of a block", ylabel="bound, nats a token")
  axes.legend(frameon=False)
  return figure
