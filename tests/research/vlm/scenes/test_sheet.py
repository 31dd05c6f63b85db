"""The contact sheet: every kind of question on it, and nothing cut."""

import subprocess
import sys

import numpy as np
from PIL import Image

from research.vlm import scenes
from research.vlm.scenes import sheet


def test_the_command_writes_a_picture_of_every_kind(tmp_path):
  path = tmp_path / "scenes.png"
  command = [sys.executable, "-m", "research.vlm.scenes.sheet", str(path)]
  subprocess.run(command, check=True)
  kinds = [x.kind for x in sheet.examples()]
  tasks = (scenes.Shapes, scenes.PopeShapes, scenes.Grounding, scenes.Text)
  tasks += (scenes.BlindTest, scenes.MultiImage)
  assert kinds == [k for t in tasks for k in t.KINDS]
  picture = Image.open(path)
  assert picture.size[0] == 5 * 210 and picture.format == "PNG"
  # Each sample's place has ink above, where its image is, and below it.
  rows = -(-len(kinds) // 5)
  tall = picture.size[1] // rows
  ink = np.asarray(picture.convert("L")) < 200
  for i in range(len(kinds)):
    part = ink[i // 5 * tall :, i % 5 * 210 :][:tall, :210]
    assert part[:140].any() and part[150:].any(), kinds[i]


def test_long_texts_end_inside_of_their_column():
  sample = scenes.Shapes()[0]
  long = scenes.Sample(
    sample.images, "word " * 90, "text " * 90, "count", "", {}, ()
  )
  picture = scenes.contact_sheet([long, sample], columns=2)
  right = np.asarray(picture)[150:, 204:212]
  assert (right == 255).all()
