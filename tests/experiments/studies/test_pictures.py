"""What pictures of studies share: colours, labels inside of the frame."""

import itertools

import numpy as np
import pytest

from experiments.core.stats import Mean
from experiments.studies import pictures
from experiments.studies.lora import pictures as lora_pictures
from research.training.reports import plots


def _row(loss, group, trained):
  table = (
    np.array([loss + 0.1, loss, loss + 0.2])[:, None] + [0, 0.01]
  ).tolist()
  return {
    "group": group,
    "trained": trained,
    "ks": [-7, -6, -5],
    "best": 1,
    "validation": table,
    "heldout": table,
    "known": table,
    "before": {"heldout": 4.0},
  }


ROWS = {
  "full": _row(1.5, "full", 1_000_000),
  **{
    f"a method of rank {i}": _row(1.6 + i / 50, "LoRA", 10 + i)
    for i in range(9)
  },
}


@pytest.fixture(name="drawn")
def _drawn(monkeypatch):
  """Returns figures instead of writing them."""
  found = []
  monkeypatch.setattr(plots, "save", lambda figure, path: found.append(figure))
  return found


def test_an_arm_has_one_colour_and_shares_it_with_none(drawn, tmp_path):
  lora_pictures.sweep(ROWS, tmp_path / "sweep.png", "title")
  left, right = drawn[0].axes
  curves = {x.get_label(): x.get_color() for x in left.get_lines()}
  curves = {n: c for n, c in curves.items() if not n.startswith("_")}
  assert len(curves) == len(set(curves.values())) == len(plots.COLORS)
  names = [t.get_text() for t in right.get_yticklabels()]
  dots = [c.lines[0].get_color() for c in right.containers]
  ranked = dict(zip(names, dots, strict=True))
  assert set(ranked) == set(ROWS)
  for name, color in ranked.items():
    assert color == curves.get(name, pictures.GREY)


def test_labels_stay_in_the_frame(drawn, tmp_path):
  lora_pictures.tradeoff(ROWS, tmp_path / "tradeoff.png")
  (figure,) = drawn
  figure.draw_without_rendering()
  for axes in figure.axes:
    frame = axes.get_window_extent()
    assert len(axes.texts) == len(ROWS)
    for text in axes.texts:
      box = text.get_window_extent()
      assert frame.x0 <= box.x0 and box.x1 <= frame.x1
      assert frame.y0 <= box.y0 and box.y1 <= frame.y1


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
