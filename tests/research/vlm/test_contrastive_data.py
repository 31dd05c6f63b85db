"""Pictures and captions as batches, and zero-shot classes by hand."""

import numpy as np
import pytest

from research.typing import UserError
from research.vlm import contrastive, scenes
from research.vlm.contrastive.zero_shot import Classes
from research.vlm.encoders import EncoderSizes, siglip, siglip_text
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.tiling import (
  AnyRes,
  Idefics3,
  InternVL,
  NaFlex,
  Square,
)
from tests import support_vlm

TASK = scenes.ShapeCaptions(size=32, cells=2, max_objects=1, count=21)
TEMPLATES = ("w2 {}", "{} w3 w4")


def captions(**fields):
  return contrastive.Captions(
    **dict(
      samples=TASK,
      preprocessor=support_vlm.PREPROCESSOR,
      length=5,
      templates=TEMPLATES,
      batch_size=8,
    )
    | fields
  )


def test_equal_captions_have_equal_ids_whatever_the_template():
  tokenizer = support_vlm.tokenizer()
  rows = captions().rows(tokenizer)
  answers = [TASK.drawn(i).answer for i in range(len(rows))]
  assert len({*answers}) < len(answers)
  pairs = {(x, int(row["ids"])) for x, row in zip(answers, rows, strict=True)}
  assert len(pairs) == len({*answers}) == len({i for _, i in pairs})
  # The words of a caption are unknown, 1; the end is 65, padding 0.
  texts = {tuple(row["captions"].tolist()) for row in rows}
  assert texts == {(2, 1, 1, 65, 0), (1, 1, 3, 4, 65)}
  short = captions(length=3).rows(tokenizer)[0]["captions"]
  assert len(short) == 3 and short[-1] == 65


@pytest.mark.parametrize("seed", [0, 1])
def test_augmentations_say_nothing_of_the_sample(seed):
  """The sample and its augmentation have the same seed and index."""
  task, drawn = scenes.DigitNames(count=40), []

  def first(image, rng):
    drawn.append(int(rng.integers(10)))
    return image

  data = captions(samples=task, augment=first, seed=seed, length=9)
  rows = data.rows(support_vlm.tokenizer())
  digits = [int(task.drawn(i).stratum) for i in range(len(rows))]
  assert all(row["captions"].size for row in rows)
  assert np.mean(np.array(drawn) == digits) < 0.4  # a tenth by chance


def test_what_pads_the_last_batch_is_no_negative():
  batches = captions().evaluation(support_vlm.tokenizer())
  ids = np.concatenate([x["ids"] for x in batches])
  assert len(ids) == 24 and (ids[21:] == -1).all() and (ids[:21] >= 0).all()
  assert batches[0]["pixels"].shape == (8, 1, 16, 16, 3)


def test_a_shifted_image_keeps_its_ground_and_its_thing():
  image = np.full((16, 16, 3), 200, np.uint8)
  image[7:9, 8:10] = 5
  places = set()
  for seed in range(40):
    found = contrastive.shifted(image, np.random.default_rng(seed))
    rows, columns, _ = np.nonzero(found == 5)
    assert (found == 5).sum() == 12 and ((found == 5) | (found == 200)).all()
    places.add((rows.min() - 7, columns.min() - 8))
  assert {x for x, _ in places} == {y for _, y in places} == {-2, -1, 0, 1, 2}


def test_a_cropped_image_shows_most_of_it_or_its_mirror_image():
  ramp = np.repeat(np.arange(0, 250, 10, np.uint8)[None], 25, 0)
  image = np.stack([ramp] * 3, -1)
  signs = set()
  for seed in range(20):
    found = contrastive.cropped(image, np.random.default_rng(seed))
    assert found.shape == image.shape
    steps = np.diff(found[12, :, 0].astype(int))
    assert (steps >= 0).all() or (steps <= 0).all()
    assert 0.6 * 240 < np.ptp(found[12, :, 0]) <= 240
    signs.add(np.sign(steps.sum()))
  assert signs == {-1, 1}


def test_templates_are_averaged_after_each_is_normalised():
  """By hand: long vectors of one template do not outweigh the others."""
  angles = np.radians([[0, 0, 60], [90, 90, 80]])
  vectors = np.stack([np.cos(angles), np.sin(angles)], -1)
  vectors[:, 2] *= 9
  classes = {"which": Classes(("east", "north"), vectors)}
  sizes = EncoderSizes(width=16, depth=1, heads=2, hidden=20, patch=4, grid=4)
  towers = contrastive.DualEncoder(
    image=siglip(sizes, head=True), text=siglip_text(sizes, vocab=30, length=5)
  )
  model = contrastive.Classifier(
    model=towers,
    params={},
    preprocessor=support_vlm.PREPROCESSOR,
    classes=classes,
  )
  # East is at 19 degrees, north at 87: what is at 50 is nearer to the first.
  at = np.radians([50.0, 56.0])
  images = np.stack([np.cos(at), np.sin(at)], -1)
  asked = ["which"] * 2
  assert model.choose(images, asked) == ["east", "north"]
  # The last template alone: 60 and 80.
  assert model.choose(images, asked, slice(2, 3)) == ["east", "east"]


@pytest.mark.parametrize("wrong", [(), ("no place",), ("{} and {}",)])
def test_templates_have_one_place(wrong):
  with pytest.raises(UserError, match=r"Captions\.templates: found"):
    captions(templates=wrong)


@pytest.mark.parametrize(
  "tiling, patches, words",
  [
    (Square(16, patch=4), 16, "found 16, expected None"),
    (NaFlex(16, patch=4), None, "found None, expected the most patches"),
    (NaFlex(16, patch=4), 0, "found 0, expected the most patches"),
  ],
)
def test_places_for_patches_are_those_of_the_tiling(tiling, patches, words):
  with pytest.raises(UserError, match=rf"Captions\.patches: {words}"):
    captions(preprocessor=Preprocessor(tiling), patches=patches)


@pytest.mark.parametrize(
  ("tiling", "views"),
  [(Idefics3(32, 16, 4, 1), 5), (InternVL(), 5), (AnyRes(), 3)],
  ids=lambda x: type(x).__name__,
)
def test_a_corner_is_not_taken_for_the_image(tiling, views):
  """Of Idefics3's views the first one is a tile; InternVL cuts long images."""
  words = rf"Captions\.preprocessor: found .* makes {views} views"
  with pytest.raises(UserError, match=words):
    captions(preprocessor=Preprocessor(tiling))
