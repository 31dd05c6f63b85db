"""Several tasks as one: whose turn it is, and whose rules apply."""

import numpy as np
import pytest

from research.typing import UserError
from research.vlm import scenes

SHAPES = scenes.Shapes(count=9, kinds=("count", "exists"), size=32)
TWO = scenes.MultiImage(count=12, size=32)
THREE = scenes.MultiImage(count=10, images=3, size=32, seed=1)
MIXED = scenes.Mixed(tasks=(SHAPES, TWO, THREE))


def test_tasks_take_turns_and_end_with_the_shortest():
  assert len(MIXED) == 27
  assert [len(x.images) for x in MIXED[:6]] == [1, 2, 3, 1, 2, 3]
  for i in (0, 4, 26, -1):
    task = (SHAPES, TWO, THREE)[i % 3 if i >= 0 else 2]
    number = i // 3 if i >= 0 else 8
    assert MIXED.drawn(i) == task.drawn(number)
    assert MIXED.outline(i) == task.outline(number)
    for one, other in zip(MIXED[i].images, task[number].images, strict=True):
      np.testing.assert_array_equal(one, other)
  with pytest.raises(IndexError):
    MIXED[27]
  with pytest.raises(UserError, match="expected at least one"):
    scenes.Mixed(tasks=())


def test_rules_answer_the_questions_of_their_own_task():
  rules = MIXED.rules(samples=64)
  samples = [MIXED.drawn(i) for i in range(27)]
  own = {
    "colour only": lambda i: i % 3 == 0,
    "most objects": lambda i: i % 3 and samples[i].kind == "more",
    "most of the colour": lambda i: i % 3,
    "majority": lambda i: True,
  }
  for name, applies in own.items():
    found = rules[name](samples)
    for i, answer in enumerate(found):
      assert (answer is not None) <= bool(applies(i)), (name, i)
    assert any(answer is not None for answer in found)
  alone = scenes.MultiImage.RULES["most of the colour"]
  for i in range(1, 27, 3):
    assert rules["most of the colour"](samples)[i] == alone([samples[i]])[0]


def test_rules_of_two_tasks_with_one_name_stay_two():
  mixed = scenes.Mixed(tasks=(SHAPES, scenes.PopeShapes(count=9)))
  rules = mixed.rules(samples=32)
  assert {"number of objects", "number of objects (PopeShapes)"} < set(rules)
