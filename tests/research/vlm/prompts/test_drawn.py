"""Rows of drawn questions: the same text as without, and the right picture."""

import dataclasses

import numpy as np
import pytest

from research.prm import formats, rows
from research.prm.labelled import LabelledSolution
from research.reasoning import prompting, words
from research.reasoning.tasks import Chain, Countdown
from research.reasoning.tasks.chain import vocabulary
from research.reasoning.tasks.countdown import vocabulary as countdown_words
from research.training.reasoning_tasks import Solutions
from research.typing import UserError
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.tiling.native import Native
from research.vlm.images.tiling.overlap import Overlap
from research.vlm.images.tiling.square import Square
from research.vlm.prompts import DrawnQuestion, WordGrid

TASK = Chain(terms=(3, 3), digits=1, totals=(0, 20), count=12)
WORDS = words.word_tokenizer(vocabulary(0, 20))
IMAGE = len(vocabulary(0, 20))
GRID = WordGrid(columns=3, rows=3, cell=8, capital=5, scatter=1)
DRAWN = DrawnQuestion(
  draw=GRID,
  preprocessor=Preprocessor(Square(tile=24, patch=8)),
  image_token=IMAGE,
  text="=",
)
SOFT = 9
"""A patch is a cell."""


def test_a_prompt_is_its_picture_and_the_text_behind_it():
  question = TASK[0].prompt
  found = DRAWN(WORDS, question)
  assert list(found) == [IMAGE] * SOFT + WORDS.encode("=")
  np.testing.assert_array_equal(found.arrays["pixels"][0], GRID(question))
  longer = prompting.followed_by(found, [1, 2])
  assert list(longer) == [*found, 1, 2] and longer.arrays is found.arrays
  assert prompting.followed_by([5], [1]) == [5, 1]


def test_a_tiling_that_pools_groups_of_patches_is_refused():
  """Its views without the groups would be another image to the model."""
  with pytest.raises(UserError, match="tiling Overlap, which pools groups"):
    dataclasses.replace(DRAWN, preprocessor=Preprocessor(Overlap()))


def test_solutions_have_their_own_pictures():
  plain = Solutions(task=TASK, length=24).rows(WORDS)
  drawn = Solutions(task=TASK, length=32, prompting=DRAWN).rows(WORDS)
  which = np.array([7, 2, 7, 0])
  batch, text = drawn.take(which), plain.take(which)
  for i, index in enumerate(which):
    question = TASK[int(index)].prompt
    np.testing.assert_array_equal(batch["pixels"][i, 0], GRID(question))
    # What is learned is what the row without a picture learns.
    learned = [x["targets"][i][x["weights"][i] > 0] for x in (batch, text)]
    np.testing.assert_array_equal(*learned)
    assert learned[0][-1] == WORDS.eos and len(learned[0]) == 2 * 6 + 1
    first = int(np.argmax(batch["weights"][i]))
    assert batch["tokens"][i, first] == WORDS.encode("=")[0]
  assert "pixels" not in text


def test_problems_that_are_drawn_at_once_have_pictures_as_well():
  task = Countdown(numbers=2, values=(1, 4), targets=(2, 9), count=3)
  names = countdown_words()
  picture = DrawnQuestion(
    draw=GRID,
    preprocessor=DRAWN.preprocessor,
    image_token=len(names),
    text=">",
  )
  data = Solutions(task=task, length=24, prompting=picture)
  found = data.rows(words.word_tokenizer(names)).take(np.arange(3))
  for i, problem in enumerate(task):
    np.testing.assert_array_equal(found["pixels"][i, 0], GRID(problem.prompt))


def test_labelled_steps_share_their_problem_s_picture(tmp_path):
  made = []
  for problem in (TASK[0], TASK[1], TASK[0]):
    steps = tuple(f"{x} " for x in TASK.solution(problem))
    labels = (1, 0) if len(made) else (None, None)  # the first is dropped
    one = LabelledSolution(prompt=problem.prompt, steps=steps, labels=labels)
    made.append(one)
  path = tmp_path / "labels.jsonl"
  formats.write(str(path), made, formats.FORMATS["native"])
  data = rows.LabelledRows(paths=str(path), length=32, prompting=DRAWN)
  with pytest.warns(RuntimeWarning, match="1 have no label"):
    found = data.rows(WORDS)
  batch = found.take(np.array([1, 0]))
  for i, problem in enumerate((TASK[0], TASK[1])):
    np.testing.assert_array_equal(batch["pixels"][i, 0], GRID(problem.prompt))
    ends = np.flatnonzero(batch["weights"][i])
    semicolon = WORDS.encode(";")[0]
    assert (batch["tokens"][i, ends] == semicolon).all() and len(ends) == 2


def test_pictures_of_several_sizes_are_an_error():
  one = DRAWN(WORDS, TASK[0].prompt)
  with pytest.raises(UserError, match="with number 2"):
    prompting.arrays_of([one, [1, 2]])
  with pytest.raises(UserError, match="keeps each picture's size"):
    DrawnQuestion(
      draw=GRID,
      preprocessor=Preprocessor(Native(patch=8)),
      image_token=IMAGE,
    )
