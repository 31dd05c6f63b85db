"""Stamps: captions, splits, negatives; the package's own where it is there."""

import collections
import pathlib

import numpy as np
import pytest
from PIL import Image

from research.typing import UserError
from research.vlm import scenes
from research.vlm.scenes import stamps
from tests import support_scenes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("stamps")
  support_scenes.write_stamps(root)
  return str(root)


def test_pairs_are_read_with_their_folders(folder):
  found = scenes.read_stamps(folder)
  assert len(found) == 48 and len({x.caption for x in found}) == 24
  first = next(x for x in found if x.name == "kind1/part3/stamp3")
  assert first.caption == "A thing of number 2."
  assert (first.category, first.folder) == ("kind1", "kind1/part3")
  assert [x.name for x in found] == sorted(x.name for x in found)


def test_a_caption_is_of_one_split(folder):
  splits = collections.defaultdict(set)
  for x in scenes.read_stamps(folder):
    splits[x.caption].add(x.split)
  assert all(len(x) == 1 for x in splits.values())
  found = collections.Counter(x.split for x in scenes.read_stamps(folder))
  assert set(found) == {"train", "validation", "heldout"}


def test_transparency_is_white_and_the_shape_is_kept(tmp_path):
  pixels = np.zeros((10, 20, 4), np.uint8)
  pixels[:, 10:] = (0, 0, 200, 255)
  path = tmp_path / "half.png"
  Image.fromarray(pixels).save(path)
  image = scenes.Stamp(path, "a/half", "Half.").image(40)
  assert image.shape == (40, 40, 3)
  assert (image[:10] == 255).all() and (image[30:] == 255).all()
  assert (image[14:26, :14] == 255).all()
  assert (image[14:26, 26:36] == (0, 0, 200)).all()
  red = scenes.Stamp(path, "a/half", "Half.").image(40, (255, 0, 0))
  assert (red[:10] == (255, 0, 0)).all()


def test_negatives_are_of_their_stratum(folder):
  task = scenes.Stamps(folder=folder, kinds=("exists",), count=400, size=16)
  samples = support_scenes.drawn(task)
  assert support_scenes.conditional_p(samples) > 1e-3
  for x in samples:
    shown = scenes.read_stamps(folder)[x.objects[0].source]
    assert shown.split == "train"
    assert x.answer == (
      "yes" if shown.caption == x.program["caption"] else "no"
    )
    if x.answer == "no":
      same = shown.category == x.program["category"]
      assert same == (x.stratum != "random")
      if x.stratum == "folder":
        assert shown.folder == x.program["folder"]
  rules = task.rules(100)
  by = {s: [x for x in samples if x.stratum == s] for s in stamps._NEGATIVES}
  score = support_scenes.accuracy
  assert score(rules["category only"], by["random"]) == 1
  yes = sum(x.answer == "yes" for x in by["folder"]) / len(by["folder"])
  assert score(rules["folder only"], by["folder"]) == yes


def test_captions_and_categories(folder):
  task = scenes.Stamps(folder=folder, kinds=("caption", "category"), count=200)
  for x in support_scenes.drawn(task):
    shown = scenes.read_stamps(folder)[x.objects[0].source]
    assert x.answer == (
      shown.caption if x.kind == "caption" else shown.category
    )
  assert task[0].image.shape == (64, 64, 3)


def test_mistakes_say_what_to_install(tmp_path):
  with pytest.raises(UserError, match="apt-get install tuxpaint-stamps-def"):
    scenes.read_stamps(str(tmp_path))
  broken = tmp_path / "a.png"
  broken.write_bytes(b"\x89PNG\r\n\x1a\n truncated")
  with pytest.raises(UserError, match=r"a\.png: cannot be read"):
    scenes.Stamp(broken, "a", "A.").image(8)


def test_the_package_where_it_is_installed():
  if not pathlib.Path(stamps.FOLDER).exists():
    pytest.skip("needs Debian's tuxpaint-stamps-default")
  found = scenes.read_stamps()
  assert len(found) > 900
  assert len({x.category for x in found}) == 16
  for x in found[::100]:
    assert x.image(32).shape == (32, 32, 3)
