"""Pictures of unmasking: what a step filled is marked, and a page plays."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from research.diffusion.sampling import visualize

PIECES = ["ab ", "c", "\n", "d", "words that wrap"]
FILLED = np.array([-1, 2, 0, 2, 0])


def test_layers_are_the_frame_each_character_once():
  for now in (-1, 0, 2, 3):
    found = visualize.layers(PIECES, FILLED, now, columns=10)
    lines = list(zip(*found.values(), strict=True))
    joined = []
    for layers in lines:
      columns = list(zip(*layers, strict=True))
      assert all(sum(c != " " for c in column) <= 1 for column in columns)
      joined.append("".join(max(column) for column in columns))
    text = visualize.frame(PIECES, FILLED, now)
    assert "".join(joined) == text.replace("\n", "")
  assert len(lines) == 3  # "ab c", and two lines of ten columns


def test_what_a_step_filled_is_new_in_its_frame_alone():
  def new(now):
    return "".join(visualize.layers(PIECES, FILLED, now)["new"]).strip()

  assert [new(now).split() for now in (-1, 0, 2, 3)] == [
    [],
    ["words", "that", "wrap"],
    ["cd"],
    [],
  ]


def test_a_moving_picture_marks_new_tokens(tmp_path):
  """Green ink is of the step's own tokens; at the end there is none."""
  from PIL import Image

  file = tmp_path / "a.gif"
  visualize.write_gif(file, PIECES, FILLED, columns=20)
  with Image.open(file) as picture:
    green, ink = [], []
    for n in range(picture.n_frames):
      picture.seek(n)
      x = np.asarray(picture.convert("RGB"), int)
      green.append(int((x[..., 1] - x[..., 0] > 60).sum()))
      ink.append(int((x.sum(-1) < 500).sum()))
  assert green[0] == green[-1] == 0
  assert green[1] > green[2] > 0  # fifteen characters, then two
  assert min(ink) > 0


def _script(page):
  return re.search(r"<script>(.*)</script>", page, re.S)[1]


STUBS = """
const parts = {};
const document = {
  getElementById: id => parts[id] ??= {
    value: "2", on: {}, addEventListener(name, f) { this.on[name] = f; },
    replaceChildren(...all) { this.all = all; },
  },
  createElement: () => ({}),
};
let beat = null;
const setInterval = f => { beat = f; return 1; };
const clearInterval = () => { beat = null; };
"""

PLAY = """
const seen = [];
parts.play.on.click();
seen.push(parts.at.value, parts.play.textContent);
while (beat) { beat(); seen.push(Number(parts.at.value)); }
seen.push(parts.play.textContent);
console.log(JSON.stringify(seen));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_play_button_shows_each_step_and_stops():
  script = STUBS + _script(visualize.page(PIECES, FILLED)) + PLAY
  done = subprocess.run(
    ["node", "-e", script], capture_output=True, text=True, timeout=60
  )
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == [-1, "Pause", 0, 2, 2, "Play"]


def test_a_page_has_a_button_and_its_moments():
  page = visualize.page(PIECES, FILLED)
  assert '<button id="play"' in page
  assert "moments = [0, 2]" in page and "setInterval(advance, 500)" in page
  assert "setInterval(advance, 80)" in visualize.page(
    ["x"] * 100, np.arange(100)
  )
