"""Captions of drawn scenes, compared with the pixels."""

import numpy as np
import pytest

from research.typing import UserError
from research.vlm import scenes
from research.vlm.scenes import drawing
from tests import support_scenes


def colour_of(part):
  """Returns the colour of most pixels that are not white, None without any."""
  for name, value in drawing.COLOURS.items():
    if (np.abs(part.astype(int) - value).max(-1) < 10).sum() > 9:
      return name
  return None


def test_captions_name_what_the_cells_show_row_by_row():
  task = scenes.ShapeCaptions(size=64, cells=4, max_objects=6, count=40)
  for sample in task:
    parts = [
      sample.image[top : top + 16, left : left + 16]
      for top in range(0, 64, 16)
      for left in range(0, 64, 16)
    ]
    found = [x for x in map(colour_of, parts) if x is not None]
    named = sample.answer.split(", ")
    assert found == [x.split(" ")[0] for x in named]
    assert sorted(named) == sorted(
      f"{x.colour} {x.name}" for x in sample.objects
    )
  assert {x.stratum for x in task} >= {"1 object", "6 objects"}


def test_one_object_is_any_class_alike():
  task = scenes.ShapeCaptions(size=32, cells=2, max_objects=1, count=900)
  samples = support_scenes.drawn(task)
  assert len(task.classes) == 9
  assert support_scenes.conditional_p(samples) > 1e-3


def test_no_objects_are_refused():
  with pytest.raises(UserError, match=r"ShapeCaptions\.min_objects: found 3"):
    scenes.ShapeCaptions(min_objects=3, max_objects=2)
  with pytest.raises(UserError, match=r"ShapeCaptions\.shapes: found \('cube'"):
    scenes.ShapeCaptions(shapes=("cube",))
