"""Plots the diagnosis of an adapter by layer."""

import os
import re
from collections.abc import Mapping

import numpy as np

from research.lora.diagnosis.diagnose import Diagnosis
from research.training.reports import plots


def draw(
  diagnoses: Mapping[str, Diagnosis], picture: str | os.PathLike, title: str
) -> None:
  """Plots intruders by threshold, and norms and ranks by layer, into a PNG."""
  drawn = plots.figure(11, 7)
  drawn.suptitle(title)
  axes = drawn.subplots(2, 2)
  _intruders(axes[0, 0], diagnoses)
  _by_layer(
    axes[0, 1], {p: d.relative for p, d in diagnoses.items()}, "|dW| / |W|"
  )
  ranks = {p: d.energy_rank for p, d in diagnoses.items()}
  _by_layer(axes[1, 0], ranks, "energy rank of dW")
  stable = {p: d.stable_rank for p, d in diagnoses.items()}
  _by_layer(axes[1, 1], stable, "stable rank of dW")
  axes[0, 1].legend(frameon=False, fontsize=7)
  plots.save(drawn, picture)


def _intruders(axes, diagnoses: Mapping[str, Diagnosis]) -> None:
  thresholds = np.linspace(0, 1, 101)
  rows = np.array(
    [[d.intruders(t) for t in thresholds] for d in diagnoses.values()]
  )
  axes.fill_between(
    thresholds, rows.min(0), rows.max(0), color="0.85", label="all matrices"
  )
  axes.plot(thresholds, rows.mean(0), color=plots.COLORS[0], label="mean")
  axes.axvline(0.5, color="0.5", linestyle=":", linewidth=0.8)
  axes.set(xlabel="largest cosine below", ylabel="intruders of a matrix")
  axes.legend(frameon=False, fontsize=7)
  axes.grid(alpha=0.3)


def _by_layer(axes, values: Mapping[str, float | int], label: str) -> None:
  kinds: dict[str, list[tuple[int, float]]] = {}
  for path, value in values.items():
    layer = re.fullmatch(r"layers/(\d+)/(.*?)(\[\d+\])?", path)
    kind, i = (layer[2], int(layer[1])) if layer else (path, 0)
    kinds.setdefault(kind, []).append((i, float(value)))
  for n, (kind, points) in enumerate(sorted(kinds.items())):
    axes.plot(
      *zip(*points, strict=True),
      marker=".",
      linewidth=0.8,
      label=kind,
      **plots.style(n),
    )
  axes.set(xlabel="layer", ylabel=label)
  axes.grid(alpha=0.3)
