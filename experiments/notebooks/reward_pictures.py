"""Pictures of process rewards: states, rollouts, scored steps, calibration."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from research.prm.labelled import LabelledSolution
from research.reasoning.problem import Problem
from research.reasoning.tasks.countdown import Countdown, parse_prompt
from research.training.reports.plots import COLORS
from research.typing import Float, Int

RIGHT, WRONG = COLORS[0], COLORS[5]
"""Blue and orange, as in `experiments.searching.display`."""


def states(task: Countdown, problem: Problem) -> Any:
  """Returns a figure of all states of a problem, from left to right.

  A state is what is left of the numbers; it is blue where the target can still
  be made of them.

  Args:
    problem: of three numbers, so that all states fit.
  """
  numbers, target = parse_prompt(problem.prompt)
  figure, axes = plt.subplots(figsize=(8, 5.4))
  rows = iter(range(10**6))

  def draw(left, depth):
    after = {state for _, state in task.moves(left)}
    below = [draw(state, depth + 1) for state in sorted(after)]
    y = np.mean(below) if below else next(rows)
    color = RIGHT if task.solvable(left, target) else WRONG
    for other in below:
      axes.plot(
        [depth + 0.16, depth + 0.84], [y, other], color="0.8", lw=0.7, zorder=0
      )
    axes.text(
      *(depth, y, " ".join(map(str, left))),
      **dict(ha="center", va="center", fontsize=8, color=color),
    )
    return y

  draw(numbers, 0)
  axes.set(xlim=(-0.4, len(numbers) - 0.6), ylim=(next(rows), -1))
  steps = range(len(numbers))
  axes.set_xticks(steps, ["numbers", *[f"after step {i}" for i in steps[1:]]])
  axes.set_yticks([])
  axes.set_title(
    f"target {target}: can be made (blue), cannot (orange)", fontsize=10
  )
  return figure


def counts(
  successes: Int[np.ndarray, " B"], right: Int[np.ndarray, " B"]
) -> Any:
  """Returns a figure of how many rollouts succeed, by the oracle's label.

  Args:
    successes: of each step, all of as many rollouts.
  """
  figure, axes = plt.subplots(figsize=(7, 3))
  bins = np.arange(successes.max() + 2) - 0.5
  groups = [successes[right == 1], successes[right == 0]]
  names = [f"right ({len(groups[0])})", f"wrong ({len(groups[1])})"]
  axes.hist(groups, bins, stacked=True, color=[RIGHT, WRONG], label=names)
  axes.set(xlabel="rollouts that succeed", ylabel="steps", yscale="symlog")
  axes.legend(frameon=False)
  return figure


def solutions(
  shown: Sequence[LabelledSolution], scores: Sequence[Sequence[float]]
) -> Any:
  """Returns a figure of solutions, a line each, steps coloured by scores.

  Args:
    scores: of their steps, 0 (orange) to 1 (blue).
  """
  most = max(len(one.steps) for one in shown)
  figure, axes = plt.subplots(figsize=(2 + 2.6 * most, 0.55 * len(shown)))
  colors = plt.get_cmap("RdYlBu")
  words = {1: "right", 0: "wrong", None: "not labelled"}
  for y, (one, own) in enumerate(zip(shown, scores, strict=True)):
    axes.text(0, y, one.prompt, va="center", fontsize=10, family="monospace")
    for i, (step, label) in enumerate(zip(one.steps, one.labels, strict=True)):
      box = plt.Rectangle(
        (0.8 + i, y - 0.42), 0.95, 0.84, color=colors(0.15 + 0.7 * own[i])
      )
      axes.add_patch(box)
      lines = f"{step.strip()}\n{own[i]:.2f}, is {words[label]}"
      axes.text(1.27 + i, y, lines, ha="center", va="center", fontsize=8.5)
  axes.set(xlim=(0, 0.8 + most), ylim=(len(shown) - 0.5, -0.5))
  axes.axis("off")
  return figure


def calibration(
  scores: Mapping[str, Float[np.ndarray, " B"]],
  labels: Float[np.ndarray, " B"],
  bins: int = 10,
) -> Any:
  """Returns a figure of the share of right steps by score."""
  figure, axes = plt.subplots(figsize=(4.2, 4.2))
  axes.plot([0, 1], [0, 1], color="0.8", lw=1)
  for (name, own), color in zip(scores.items(), COLORS, strict=False):
    parts = np.array_split(np.argsort(own, kind="stable"), bins)
    x, y = ([float(z[part].mean()) for part in parts] for z in (own, labels))
    axes.plot(x, y, "o-", color=color, markersize=4, label=name)
  axes.set(xlabel="score", ylabel="share that is right")
  axes.legend(frameon=False, loc="upper left")
  return figure
