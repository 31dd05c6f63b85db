"""The other scenes: each answer and stratum by an independent check."""

import collections

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from research.typing import UserError
from research.vlm import evaluation, scenes
from research.vlm.scenes import digits, drawing, multi_image, tiles
from research.vlm.scenes import text as text_scenes
from tests import support_scenes


def _grouped(task):
  found = collections.defaultdict(list)
  for x in support_scenes.drawn(task):
    found[x.kind].append(x)
  return found


def _uniform(samples, by_stratum=True):
  assert support_scenes.conditional_p(samples) > 1e-3
  for stratum in {x.stratum for x in samples} if by_stratum else ():
    some = [x for x in samples if x.stratum == stratum]
    assert support_scenes.conditional_p(some) > 1e-3, stratum


# POPE ------------------------------------------------------------------------


def test_pope_strata_and_popularity():
  task = scenes.PopeShapes(count=2400)
  samples = support_scenes.drawn(task)
  _uniform(samples)
  frequent = collections.Counter()
  for x in samples:
    asked = x.program["colour"], x.program["shape"]
    present = [(o.colour, o.name) for o in x.objects]
    assert (asked in present) == (x.answer == "yes")
    if x.stratum == "popular":
      assert asked in task.pairs[: task.popular]
    if x.stratum == "adversarial":
      assert any((c == asked[0]) != (s == asked[1]) for c, s in present)
    if x.stratum == "random":
      frequent.update(p for p in present if p != asked)
  # What is called popular is: of Zipf's law, in order.
  found = [frequent[p] for p in task.pairs]
  assert found[0] > 1.3 * found[1] > 1.3 * found[3] > 1.3 * found[8]
  assert {c for c, _ in task.pairs[:4]} == set(task.colours)
  assert {s for _, s in task.pairs[:4]} == {"circle", "square", *task.shapes}


# Grounding -------------------------------------------------------------------


def test_boxes_are_those_of_the_pixels():
  """The extent of the asked object's colour in the image, and strata."""
  task = scenes.Grounding(count=120, size=100, cells=4)
  for x in task:
    named = x.program["colour"], x.program["shape"]
    pairs = [(o.colour, o.name) for o in x.objects]
    assert pairs.count(named) == 1 and 3 <= len(pairs) <= 6
    shared = [sum(p[i] == named[i] for p in pairs) > 1 for i in range(2)]
    assert shared == [x.stratum == "shared"] * 2
    if x.stratum == "distinct":  # nothing else has its colour
      red, green, blue = drawing.COLOURS[named[0]]
      part = np.abs(x.image.astype(int) - (red, green, blue)).max(-1) < 60
      rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
      found = f"{columns[0]} {rows[0]} {columns[-1] + 1} {rows[-1] + 1}"
      assert evaluation.box_score(found, x.answer, threshold=0.7) == 1


def test_grounding_rules():
  task = scenes.Grounding(count=900)
  samples = support_scenes.drawn(task)
  for name, rule in task.rules(1).items():
    score = {"distinct": [], "shared": []}
    for x, answer in zip(samples, rule(samples), strict=True):
      score[x.stratum].append(evaluation.box_score(answer, x.answer))
    means = [np.mean(score[s]) for s in ("distinct", "shared")]
    # One attribute is enough, but for others that share it; the middle is not.
    assert means[0] == (0 if name == "centre" else 1) or means[0] < 0.05
    assert means[1] < (0.05 if name == "centre" else 0.6)


# Several images --------------------------------------------------------------


def test_multi_image_answers_and_strata():
  task = scenes.MultiImage(count=1200, images=3)
  by_kind = _grouped(task)
  for samples in by_kind.values():
    _uniform(samples)
  for x in by_kind["more"]:
    areas = [multi_image.area(x, x.program["colour"], i) for i in range(3)]
    assert x.choices[int(np.argmax(areas))] == x.answer
    second, first = sorted(areas)[1:]
    assert (2 * second > first) == (x.stratum == "close") and first > second
  for x in by_kind["which"]:
    colour, shape = x.program["colour"], x.program["shape"]
    pairs = [
      [(o.colour, o.name) for o in x.objects if o.image == i] for i in range(3)
    ]
    has = [(colour, shape) in found for found in pairs]
    assert has.count(True) == 1 and x.choices[has.index(True)] == x.answer
    for found in (p for p, own in zip(pairs, has, strict=True) if not own):
      some = {c for c, _ in found}, {s for _, s in found}
      unbound = x.stratum == "unbound"
      assert (colour in some[0]) == (shape in some[1]) == unbound


def test_more_of_a_colour_is_so_in_pixels():
  task = scenes.MultiImage(count=20, kinds=("more",))
  for x in task:
    colour = drawing.COLOURS[x.program["colour"]]
    seen = [(image == colour).all(-1).sum() for image in x.images]
    assert x.choices[int(np.argmax(seen))] == x.answer


# Geometry --------------------------------------------------------------------


def _crosses(a, b, c, d) -> bool:
  """Whether segments ab and cd cross, by orientations."""

  def turn(p, q, r):
    return np.sign(
      (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])
    )

  return turn(a, b, c) * turn(a, b, d) < 0 and turn(c, d, a) * turn(c, d, b) < 0


def test_geometry_answers():
  by_kind = _grouped(scenes.BlindTest(count=1600))
  for samples in by_kind.values():
    _uniform(samples)
  for x in by_kind["lines"]:
    one, two = (o.points for o in x.objects)
    found = sum(
      _crosses(*one[i : i + 2], *two[j : j + 2])
      for i in range(2)
      for j in range(2)
    )
    assert str(found) == x.answer
  for x in by_kind["circles"]:
    (xa, ya), (xb, yb) = (o.centre for o in x.objects)
    radii = [(o.box[2] - o.box[0]) / 2 for o in x.objects]
    distance = np.hypot(xa - xb, ya - yb)
    assert (distance < sum(radii)) == (x.answer == "yes")
    assert distance > abs(radii[0] - radii[1])  # neither is inside the other
    assert (abs(distance - sum(radii)) < 4) == (x.stratum == "close")


def test_nested_squares_and_grids_are_so_in_pixels():
  """Labels count them: the rooms between lines, and those of a grid."""
  for x in scenes.BlindTest(count=40, kinds=("squares", "grid"), size=96):
    white = x.image.min(-1) > 200
    rooms = ndimage.label(white)[1] - 1  # without what is around
    if x.kind == "squares":
      assert rooms == int(x.answer)
    else:
      rows, columns = x.count(name="rows") + 1, x.count(name="columns") + 1
      assert rooms == rows * columns
      assert x.answer == str(rows if x.stratum == "rows" else columns)


# Text ------------------------------------------------------------------------


def test_capitals_are_as_high_as_the_stratum_says():
  task = scenes.Text(kinds=("line",), count=60)
  heights = set()
  for x in task:
    rows = np.flatnonzero((x.image < 128).any((1, 2)))
    height = int(x.stratum.split()[0])
    # Round letters reach over both lines.
    assert height <= rows[-1] - rows[0] + 1 <= height + 2
    assert set(x.answer) <= set(text_scenes.ALPHABET)
    heights.add(height)
  assert heights == set(task.heights)
  plain = np.full((40, 80, 3), 255, np.uint8)
  for height in task.heights:
    canvas = Image.fromarray(plain)
    drawing.write(ImageDraw.Draw(canvas), 4, 8, "HH", height)
    rows = np.flatnonzero((np.asarray(canvas) < 128).any((1, 2)))
    assert (rows[0], rows[-1] + 1) == (8, 8 + height)


def test_fields_and_bars():
  task = scenes.Text(count=900, kinds=("field", "bar"))
  by_kind = _grouped(task)
  for x in by_kind["field"]:
    values = dict(o.name.split(": ") for o in x.objects)
    assert values[x.program["field"]] == x.answer and len(values) == 3
  for x in by_kind["bar"]:
    # The height of the bar over the base, in the axis's unit.
    (o,) = [o for o in x.objects if o.name[0] == x.program["bar"]]
    assert x.answer == str((o.box[3] - o.box[1]) // x.program["unit"])
  values = collections.Counter(x.answer for x in by_kind["bar"])
  assert len(values) == 10 and max(values.values()) < 2 * min(values.values())
  rules = task.rules(100)
  first = support_scenes.accuracy(rules["first field"], by_kind["field"])
  assert abs(first - 1 / 3) < 0.07  # each of three lines is asked for alike
  for x in scenes.Text(count=40, kinds=("bar",)):
    for o in x.objects:  # the pixels of a bar are blue from top to bottom
      column = (o.box[0] + o.box[2]) // 2
      blue = (x.image[:, column] == drawing.COLOURS["blue"]).all(-1)
      lines = (o.box[3] - o.box[1]) // (5 * x.program["unit"])
      assert blue.sum() >= o.box[3] - o.box[1] - 1 - lines


# Tiles -----------------------------------------------------------------------


def test_letters_cross_borders_where_the_stratum_says():
  task = scenes.SpotTiles(count=400, size=192, tile=96, height=12)
  by_kind = _grouped(task)
  for samples in by_kind.values():
    _uniform(samples)
    for x in samples:
      crossing = [
        o.box[0] < 96 < o.box[2] or o.box[1] < 96 < o.box[3] for o in x.objects
      ]
      assert any(crossing) == (x.stratum == "border")
  inside = [x for x in by_kind["count"] if x.stratum == "inside"]
  border = [x for x in by_kind["count"] if x.stratum == "border"]
  alone = task.rules(10)["tiles alone"]
  assert support_scenes.accuracy(alone, inside) == 1
  # Counted twice at the border; right only where the answer has no larger one.
  wrong = [x for x in border if x.answer != "4"]
  assert support_scenes.accuracy(alone, wrong) == 0


def test_tiles_of_a_box():
  boxes = [(0, 0, 96, 96), (0, 0, 97, 96), (95, 95, 97, 97), (96, 5, 192, 9)]
  assert [tiles.tiles_of(box, 96) for box in boxes] == [1, 2, 4, 1]


def test_letters_are_drawn_in_their_boxes():
  task = scenes.SpotTiles(count=12, size=192, tile=96, height=12)
  for x in task:
    ink = (x.image[..., 0] < 250).astype(int)
    for o in x.objects:
      left, top, right, bottom = o.box
      assert (ink[top:bottom, left:right] > 0).any()
      ink[top:bottom, left:right] = 0
    assert not ink.any()


# Digits ----------------------------------------------------------------------


@pytest.fixture
def fake_digits(monkeypatch):
  """Images like scikit-learn's, a third of them twice, where it is missing."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 17, (900, 8, 8)).astype(np.uint8)
  labels = (np.arange(900) % 10).astype(np.uint8)
  images[600:] = images[:300]
  digits.indices.cache_clear()
  monkeypatch.setattr(digits, "load", lambda: (images, labels))
  yield images, labels
  digits.indices.cache_clear()


def test_digits(fake_digits):
  task = scenes.Digits(count=3000)
  by_kind = _grouped(task)
  _, labels = fake_digits
  for kind in ("total", "count", "sum", "exists"):
    _uniform(by_kind[kind], by_stratum=False)
  for kind, samples in by_kind.items():
    for x in samples:
      names = [str(labels[o.source]) for o in x.objects]
      assert names == [o.name for o in x.objects]
      asked = x.program.get("digit")
      left_to_right = sorted(x.objects, key=lambda o: o.box[0])
      expected = {
        "read": " ".join(o.name for o in left_to_right),
        "total": str(len(names)),
        "count": str(names.count(asked)),
        "sum": str(sum(map(int, names))),
        "exists": "yes" if asked in names else "no",
      }
      assert x.answer == expected[kind]
  rules = task.rules(500)
  # One of two digits leaves ten sums at least, and 19 in all.
  assert support_scenes.accuracy(rules["one digit only"], by_kind["sum"]) < 0.3


def test_a_digit_alone_has_its_name(fake_digits):
  images, labels = fake_digits
  task = scenes.DigitNames(count=300, scale=1)
  words = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
  ]
  for x in task:
    (shown,) = x.objects
    assert x.answer == words[labels[shown.source]]
    ink = np.round(255 - images[shown.source] * (255 / 16))
    np.testing.assert_array_equal(x.image, np.stack([ink] * 3, -1))
  assert support_scenes.conditional_p(task) > 1e-3


def test_an_image_of_a_digit_is_of_one_split(fake_digits):
  images, labels = fake_digits
  shown = {}
  for split in ("train", "validation", "heldout"):
    task = scenes.Digits(count=600, split=split)
    used = {o.source for x in support_scenes.drawn(task) for o in x.objects}
    shown[split] = {images[i].tobytes() for i in used}
    for digit, some in digits.indices(split).items():
      assert len(some) and (labels[some] == digit).all()
  a, b, c = shown.values()
  assert len(a) > 400 and min(len(b), len(c)) > 30
  assert not (a & b or a & c or b & c)


def test_digits_are_drawn_as_they_are(fake_digits):
  images, _ = fake_digits
  sample = scenes.Digits(scale=1)[1]
  for o in sample.objects:
    left, top, right, bottom = o.box
    ink = 255 - sample.image[top:bottom, left:right, 0].astype(float)
    np.testing.assert_allclose(ink * 16 / 255, images[o.source], atol=0.04)


def test_digits_are_those_of_the_package():
  package = pytest.importorskip("sklearn.datasets")
  found = package.load_digits()
  images, labels = digits.load()
  np.testing.assert_array_equal(images, found.images)
  np.testing.assert_array_equal(labels, found.target)
  for split in ("train", "validation", "heldout"):
    assert min(map(len, digits.indices(split).values())) > 5
  assert scenes.Digits()[0].image.shape == (64, 64, 3)


def test_without_the_package_digits_say_what_to_install(monkeypatch):
  digits.load.cache_clear()
  digits.indices.cache_clear()
  monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"pip install -e '\.\[vlm\]'"):
    scenes.Digits()[0]
