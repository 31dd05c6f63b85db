"""Tasks: what a sample depends on, and that splits share no scene."""

import dataclasses

import numpy as np
import pytest

from research.typing import UserError
from research.vlm import scenes
from tests import support_scenes

TASKS = (
  scenes.Shapes(count=40),
  scenes.PopeShapes(count=24),
  scenes.Grounding(count=24),
  scenes.MultiImage(count=24, images=3),
  scenes.BlindTest(count=24),
  scenes.Text(count=24),
  scenes.SpotTiles(count=6, size=128, tile=64, height=8),
)
IDS = [type(x).__name__ for x in TASKS]


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_a_sample_depends_on_seed_and_index_alone(task):
  longer = dataclasses.replace(task, count=task.count + 8)
  other = dataclasses.replace(task, seed=1)
  for i in (3, 0, task.count - 1):
    one, two = task[i], longer[i]
    assert dataclasses.replace(one, images=()) == task.drawn(i)
    assert task.drawn(i) == longer.drawn(i)
    assert task.drawn(i).objects != other.drawn(i).objects
    for a, b in zip(one.images, two.images, strict=True):
      assert a.dtype == np.uint8 and a.ndim == 3 and a.shape[-1] == 3
      np.testing.assert_array_equal(a, b)
  kinds = [x.kind for x in support_scenes.drawn(task)]
  n = len(task.KINDS)
  assert kinds == [task.KINDS[i % n] for i in range(task.count)]


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_an_outline_is_the_sample_but_for_its_pixels(task):
  for i in range(2):
    sample, sizes = task.outline(i)
    whole = task[i]
    assert sample == dataclasses.replace(whole, images=())
    assert sizes == tuple(image.shape[:2] for image in whole.images)


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_a_split_shares_no_scene_with_another(task):
  """Whatever their seeds: also those that would draw the same scene."""
  scenes_of = {}
  for split in ("train", "validation", "heldout"):
    for seed in (0, 1):
      some = dataclasses.replace(task, split=split, seed=seed, count=24)
      found = {x.objects for x in support_scenes.drawn(some)}
      scenes_of.setdefault(split, set()).update(found)
  a, b, c = scenes_of.values()
  assert len(a) > 30 and not (a & b or a & c or b & c)


def test_a_task_is_a_sequence():
  task = scenes.Shapes(count=5)
  assert len(list(task)) == len(task) == 5
  assert task[-1].objects == task[4].objects
  assert [x.objects for x in task[1:3]] == [task[1].objects, task[2].objects]
  with pytest.raises(IndexError):
    task[5]


def test_mistakes_name_the_field():
  with pytest.raises(UserError, match=r"Shapes\.kinds: found 'counts'"):
    scenes.Shapes(kinds=("counts",))
  with pytest.raises(UserError, match=r"Shapes\.max_objects: found 17"):
    scenes.Shapes(max_objects=17)
  with pytest.raises(UserError, match=r"found 'pink', expected some of red"):
    scenes.Shapes(colours=("pink", "red", "blue"))
  with pytest.raises(UserError, match=r"Text\.width: found 60, expected"):
    scenes.Text(width=60)
  with pytest.raises(UserError, match=r"found 2 images; use Sample\.images"):
    scenes.MultiImage()[0].image  # noqa: B018


def test_rules_answer_new_samples_by_what_they_counted():
  rule = scenes.BestGiven(lambda x: x.program.get("colour"))
  base = scenes.Shapes(count=1).drawn(0)

  def sample(question, answer, colour):
    return dataclasses.replace(
      base,
      question=question,
      answer=answer,
      program={"colour": colour},
      choices=("no", "yes"),
    )

  known = [
    *[sample("a", "yes", "red")] * 2,
    sample("a", "no", "red"),
    *[sample("a", "no", "blue")] * 3,
  ]
  new = [("a", "red"), ("a", "blue"), ("a", "green"), ("b", "red")]
  samples = [sample(question, "?", colour) for question, colour in new]
  # The most frequent answer of (text, colour), of the text, the first choice.
  assert rule.fit(known)(samples) == ["yes", "no", "no", "no"]
  # Without others' counts it flatters: it is fitted to what it answers.
  assert rule(known) == ["yes"] * 3 + ["no"] * 3
  assert rule([]) == []
  # It is about another kind of question.
  other = dataclasses.replace(rule, kinds=("no such kind",))
  assert other(known[:2]) == other.fit(known)(known[:2]) == [None, None]
