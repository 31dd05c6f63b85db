"""Plots a schedule: how full each slot is, bundle by bundle."""

import pathlib

import numpy as np

from kernels_pallas.inspect.schedule import Schedule

COLUMNS = 400


def draw(schedules: list[Schedule], path: pathlib.Path) -> None:
  """Writes a PNG with one panel per schedule; needs matplotlib.

  Args:
    schedules: What to plot, one below the other.
    path: Path of the PNG.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(
    len(schedules), 1, figsize=(12, 2.8 * len(schedules)), squeeze=False
  )
  for axis, one in zip(axes[:, 0], schedules, strict=True):
    full = one.use / one.capacity
    pieces = np.array_split(full, min(COLUMNS, len(full)))
    image = np.stack([piece.mean(0) for piece in pieces], axis=1)
    axis.imshow(
      image, aspect="auto", vmin=0, vmax=1, cmap="viridis",
      extent=(0, len(full), len(one.slots) - 0.5, -0.5),
      interpolation="nearest",
    )  # fmt: skip
    axis.set_yticks(range(len(one.slots)), one.slots, fontsize=7)
    axis.set_title(f"{one.name}: {one.bundles:.0f} bundles", fontsize=9)
    axis.set_xlabel("bundle of a grid step", fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=110)
  plt.close(figure)
