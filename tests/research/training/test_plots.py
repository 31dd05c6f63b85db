"""Pictures: the file is a PNG, and what it is drawn from is the run."""

import json

import pytest

from research.training import plots
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


def test_nothing_to_draw(tmp_path):
  with pytest.raises(UserError, match="no losses to draw"):
    plots.loss_curve(tmp_path / "none.jsonl", tmp_path / "x.png", title="")


def test_smooth_is_a_running_mean():
  assert plots.smooth([1.0, 2.0, 3.0, 4.0], share=0.5) == [1, 1.5, 2.5, 3.5]
  assert plots.smooth([], share=0.5) == []
