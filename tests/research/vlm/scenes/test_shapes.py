"""Shapes: uniform answers, strata that are what they say, rules' scores."""

import collections
import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from research.typing import UserError
from research.vlm import scenes
from research.vlm.scenes import drawing
from tests import support_scenes

MANY = scenes.Shapes(count=6000)
HELD_OUT = (("red", "square"), ("blue", "circle"))


@pytest.fixture(scope="module")
def by_kind():
  found = collections.defaultdict(list)
  for x in support_scenes.drawn(MANY):
    found[x.kind].append(x)
  return found


def _names(x, part):
  return x.program.get(part)


def _answer(x):
  """Answers by other means than the generator: from the objects alone."""
  pairs = [(o.colour, o.name) for o in x.objects]
  colour, shape = _names(x, "colour"), _names(x, "shape")
  if x.kind in ("count", "exists"):
    found = [
      (c, s) for c, s in pairs if colour in (None, c) and shape in (None, s)
    ]
    return str(len(found)) if x.kind == "count" else "yes" if found else "no"
  if x.kind == "colour":
    (found,) = [c for c, s in pairs if s == shape]
    return found
  if x.kind == "compare":
    colours = [c for c, _ in pairs]
    first, second = (colours.count(_names(x, p)) for p in ("first", "second"))
    assert first != second
    return "yes" if first > second else "no"
  first, second = (
    next(o for o in x.objects if f"{o.colour} {o.name}" == _names(x, part))
    for part in ("first", "second")
  )
  assert pairs.count((first.colour, first.name)) == 1
  assert pairs.count((second.colour, second.name)) == 1
  (x0, y0), (x1, y1) = first.centre, second.centre
  holds = {
    "left of": x0 < x1,
    "right of": x0 > x1,
    "above": y0 < y1,
    "below": y0 > y1,
  }
  return "yes" if holds[_names(x, "relation")] else "no"


def test_answers_are_those_of_the_objects(by_kind):
  assert set(by_kind) == set(MANY.KINDS)
  for samples in by_kind.values():
    for x in samples:
      assert x.answer == _answer(x), x


def test_answers_are_uniform_given_the_text(by_kind):
  for kind, samples in by_kind.items():
    assert support_scenes.conditional_p(samples) > 1e-3, kind
    for stratum in {x.stratum for x in samples} - {"colour", "shape", "pair"}:
      some = [x for x in samples if x.stratum == stratum]
      assert support_scenes.conditional_p(some) > 1e-3, (kind, stratum)


def test_uniformity_can_fail(by_kind):
  """What a scene happens to have is not uniform: few scenes have many."""
  natural = []
  for x in by_kind["count"]:
    other = x.objects[0]
    colour = {"red": "green", "green": "blue", "blue": "red"}[other.colour]
    count = min(x.count(colour), 4)
    text = f"How many {colour} objects are there?"
    natural.append(dataclasses.replace(x, question=text, answer=str(count)))
  assert support_scenes.conditional_p(natural) < 1e-6


def test_strata_of_negatives_are_what_they_say(by_kind):
  counts = collections.Counter()
  for x in by_kind["exists"]:
    pairs = [(o.colour, o.name) for o in x.objects]
    colour, shape = x.program["colour"], x.program["shape"]
    if x.answer == "yes":
      pairs.remove((colour, shape))  # what else is there
    present = (colour in [c for c, _ in pairs], shape in [s for _, s in pairs])
    if x.answer == "no":
      expected = {"absent": 0, "one": 1, "both": 2}[x.stratum]
      assert sum(present) == expected, x
    elif x.stratum == "absent":
      assert not any(present)
    counts[x.stratum, x.answer] += 1
  assert len(counts) == 6 and min(counts.values()) > 120


def test_bags_of_attributes_do_not_say_what_is_bound(by_kind):
  """In the stratum "both" a positive is a negative with two shapes swapped."""
  bags = {"yes": collections.Counter(), "no": collections.Counter()}
  for x in by_kind["exists"]:
    if x.stratum == "both":
      bag = (
        x.count(colour=x.program["colour"]),
        x.count(name=x.program["shape"]),
        len(x.objects),
      )
      assert bag[0] and bag[1]
      bags[x.answer][bag[:2]] += 1
  n = {answer: sum(bag.values()) for answer, bag in bags.items()}
  assert min(n.values()) > 150
  for key in bags["yes"] | bags["no"]:
    shares = [bags[answer][key] / n[answer] for answer in n]
    # Four standard errors of a difference of shares.
    spread = 4 * np.sqrt(sum(s * (1 - s) for s in shares) / min(n.values()))
    assert abs(shares[0] - shares[1]) <= spread + 0.02


def test_relation_strata(by_kind):
  half = MANY.size / 2
  for x in by_kind["relation"]:
    axis = 0 if x.program["relation"] in ("left of", "right of") else 1
    sides = {
      o.centre[axis] < half
      for o in x.objects
      if f"{o.colour} {o.name}" in (x.program["first"], x.program["second"])
    }
    assert (len(sides) == 1) == (x.stratum == "same half")


def test_rules_score_what_they_must(by_kind):
  rules = MANY.rules(600)
  exists = collections.defaultdict(list)
  for x in by_kind["exists"]:
    exists[x.stratum].append(x)
  score = support_scenes.accuracy
  # Where neither attribute occurs, each alone is enough; where both do, none.
  for name in ("colour only", "shape only", "both somewhere"):
    assert score(rules[name], exists["absent"]) == 1
    yes = [x for x in exists["both"] if x.answer == "yes"]
    share = len(yes) / len(exists["both"])
    assert score(rules[name], exists["both"]) == share
  assert score(rules["both somewhere"], exists["one"]) == 1
  # One of the two rules knows nothing in half of this stratum: 3/4.
  assert abs(score(rules["colour only"], exists["one"]) - 0.75) < 0.08
  # A rule that ignores nothing is no baseline: one attribute is the question.
  for x in by_kind["count"]:
    assert (rules["colour only"]([x]) == [None]) == (x.stratum != "pair")
  relation = [x for x in by_kind["relation"] if x.stratum == "across"]
  assert score(rules["first object only"], relation) == 1
  assert abs(score(rules["majority"], by_kind["exists"]) - 0.5) < 0.06
  assert rules["colour only"](by_kind["relation"][:2]) == [None, None]


def test_rules_on_a_set_that_can_be_counted_by_hand():
  def sample(objects, colour, shape, answer):
    box = (0, 0, 4, 4)
    return scenes.Sample(
      (),
      f"Is there a {colour} {shape}?",
      answer,
      "exists",
      "",
      {"colour": colour, "shape": shape},
      tuple(scenes.Object(s, c, box) for c, s in objects),
      ("yes", "no"),
    )

  some = [
    sample([("red", "circle")], "red", "circle", "yes"),
    sample([("red", "square")], "red", "circle", "no"),
    sample([("blue", "circle")], "red", "circle", "no"),
    sample([("red", "square"), ("blue", "circle")], "red", "circle", "no"),
    sample([], "red", "circle", "no"),
  ]
  rules = scenes.Shapes.RULES
  assert rules["colour only"](some) == ["yes", "yes", "no", "yes", "no"]
  assert rules["shape only"](some) == ["yes", "no", "yes", "yes", "no"]
  assert rules["both somewhere"](some) == ["yes", "no", "no", "yes", "no"]
  assert rules["majority"](some) == ["no"] * 5


def test_images_show_the_objects():
  """As many patches of a colour as objects, each over its centre."""
  task = scenes.Shapes(count=30, size=96)
  for x in task:
    assert x.image.shape == (96, 96, 3)
    ink = (x.image.astype(int).min(-1) < 200).astype(int)
    for o in x.objects:
      column, row = (int(c) for c in o.centre)
      assert tuple(x.image[row, column]) == drawing.COLOURS[o.colour]
      left, top, right, bottom = o.box
      ink[top:bottom, left:right] = 0
    assert not ink.any()
  # Shapes of one colour that do not touch: labels count them.
  one = scenes.Object("circle", "red", (2, 2, 20, 20))
  two = scenes.Object("star", "blue", (30, 30, 50, 50))
  picture = drawing.scene([one, two], 64, 64)
  touching = np.ones((3, 3))
  assert ndimage.label(picture.min(-1) < 128, touching)[1] == 2


def test_shapes_differ_in_their_ink():
  """Shares of a box that each shape covers, as geometry has it."""
  expected = {"circle": np.pi / 4, "square": 0.81, "diamond": 0.5}
  expected["triangle"] = 0.98 * 1.8 / 4
  expected["cross"] = (4 * 0.36 * 2 - 4 * 0.36**2) / 4
  for name, share in expected.items():
    box = scenes.Object(name, "black", (0, 0, 80, 80))
    picture = drawing.scene([box], 80, 80)[..., 0].astype(float)
    found = ((255 - picture) / 235).mean()
    assert abs(found - share) < 0.02, name


def test_pairs_held_out_are_asked_about_in_novel_scenes_alone():
  familiar = scenes.Shapes(count=900, held_out=HELD_OUT)
  for x in support_scenes.drawn(familiar):
    assert not {(o.colour, o.name) for o in x.objects} & set(HELD_OUT)
  novel = dataclasses.replace(
    familiar, composition="novel", kinds=("count", "exists")
  )
  samples = support_scenes.drawn(novel)
  for x in samples:
    assert (x.program["colour"], x.program["shape"]) in HELD_OUT
    assert x.answer == _answer(x)
  assert support_scenes.conditional_p(samples) > 1e-3
  with pytest.raises(UserError, match="found 'novel' without pairs"):
    scenes.Shapes(composition="novel", kinds=("count",))
  with pytest.raises(UserError, match="with kinds that name no pair"):
    scenes.Shapes(composition="novel", held_out=HELD_OUT)
  too_many = (("red", "square"), ("red", "circle"))
  for held_out in (too_many, (("red", "star"),)):
    with pytest.raises(UserError, match=r"Shapes\.held_out: found"):
      scenes.Shapes(held_out=held_out)


def test_the_smallest_settings_draw_all_kinds():
  small = scenes.Shapes(max_objects=4, max_count=2, size=32, count=200)
  for x in support_scenes.drawn(small):
    assert x.answer == _answer(x) and len(x.objects) <= 4
