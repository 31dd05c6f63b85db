"""Plots: the file is a PNG, and its data are the run's."""

import json

import pytest

from research.training.reports import plot_runs, plots
from research.typing import UserError


def write(path, rows):
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_loss_curve(tmp_path):
  rows = [{"step": s, "train/loss": 4 - s / 20} for s in range(1, 41)]
  rows += [{"step": s, "validation/loss": 4 - s / 25} for s in (20, 40)]
  write(tmp_path / "metrics.jsonl", rows)
  picture = tmp_path / "loss.png"
  plots.loss_curve(
    tmp_path / "metrics.jsonl",
    picture,
    title="A run",
    points=((0, 4.1, "held-out before"), (40, 2.4, "held-out after")),
  )
  data = picture.read_bytes()
  assert data.startswith(b"\x89PNG\r\n\x1a\n")
  assert int.from_bytes(data[16:20], "big") >= 800  # width in pixels
  with pytest.raises(UserError, match="cannot be written"):
    plots.loss_curve(
      tmp_path / "metrics.jsonl", tmp_path / "no" / "x.png", title=""
    )


def test_an_empty_step_is_not_drawn(tmp_path, monkeypatch):
  """A step without targets has loss 0, which is not a measurement."""
  rows = [
    {"step": 1, "train/loss": 4.0, "train/weight": 9.0},
    {"step": 2, "train/loss": 0.0, "train/weight": 0.0},
    {"step": 3, "train/loss": 3.0, "train/weight": 2.0, "a/loss": 0.0},
  ]
  write(tmp_path / "metrics.jsonl", rows)
  drawn = []
  monkeypatch.setattr(plots, "save", lambda figure, _: drawn.append(figure))
  plots.loss_curve(tmp_path / "metrics.jsonl", "x.png", title="")
  train, _, other = drawn[0].axes[0].lines
  assert train.get_xydata().tolist() == [[1, 4], [3, 3]]
  assert other.get_xydata().tolist() == [[3, 0]]
  assert plot_runs.series(rows, "train/loss") == ([1, 3], [4.0, 3.0])
  assert plot_runs.series(rows, "train/weight")[0] == [1, 2, 3]


def test_nothing_to_draw(tmp_path):
  with pytest.raises(UserError, match="no losses to draw"):
    plots.loss_curve(tmp_path / "none.jsonl", tmp_path / "x.png", title="")


def test_smooth_is_a_running_mean():
  assert plots.smooth([1.0, 2.0, 3.0, 4.0], share=0.5) == [1, 1.5, 2.5, 3.5]
  assert plots.smooth([], share=0.5) == []
