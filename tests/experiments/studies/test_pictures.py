"""What pictures of studies share: colours, labels inside of the frame."""

import itertools

import numpy as np

from experiments.core.stats import Mean
from experiments.studies import pictures
from research.training.reports import plots


def test_names_of_points_close_together_are_legible():
  figure = plots.figure(4, 3)
  axes = figure.add_subplot()
  points = {f"point {i}": (0.5 + 0.001 * i, 0.5) for i in range(4)}
  axes.plot(*zip(*points.values(), strict=True), "o")
  figure.draw_without_rendering()
  pictures.label_points(axes, points)
  boxes = [text.get_window_extent() for text in axes.texts]
  assert len(boxes) == 4
  for one, other in itertools.combinations(boxes, 2):
    assert not one.overlaps(other)


def test_one_seed_has_no_whiskers():
  assert pictures.halves([Mean(1, 0.5), Mean(1, np.inf)]) == [0.5, 0.0]
