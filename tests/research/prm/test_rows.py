"""Labelled steps as rows, against TRL's `tokenize_row` and closed forms."""

import dataclasses
import os

import numpy as np
import pytest

from experiments.searching.prompts import Chat
from research.data.sources import NoExamples, split_of
from research.prm import formats, rows
from research.prm.labelled import LabelledSolution
from research.reasoning.trace import MonteCarlo
from research.typing import UserError


class Characters:
  """One id a character, and none before a text."""

  stop = ()

  def encode(self, text):
    return list(map(ord, text))

  prompt = encode


def solution(**fields):
  given = dict(prompt="ab", steps=("cd", "e"), labels=(1, 0))
  return LabelledSolution(**given | fields)


def data(tmp_path, solutions, **fields):
  path = tmp_path / "labels.jsonl"
  formats.write(str(path), solutions, formats.FORMATS["native"])
  return rows.LabelledRows(
    paths=str(path), **dict(length=9, batch_size=2) | fields
  )


def test_a_row_is_that_of_trl(tmp_path):
  """TRL 0.24's `PRMTrainer.tokenize_row` of the same record (its own output).

  ids 97 98 99 100 10 101 10, labels -100 x 4, 1, -100, 0.
  """
  found = data(tmp_path, [solution()], separator="\n").rows(Characters())
  assert len(found) == 1
  row = found[0]
  np.testing.assert_array_equal(
    row["tokens"], [97, 98, 99, 100, 10, 101, 10, 0, 0]
  )
  labels = np.where(row["weights"] > 0, row["labels"], -100)
  np.testing.assert_array_equal(
    labels, [-100, -100, -100, -100, 1, -100, 0, -100, -100]
  )
  np.testing.assert_array_equal(row["positions"], [0, 1, 2, 3, 4, 5, 6, -1, -1])
  np.testing.assert_array_equal(row["segments"], [0] * 7 + [-1] * 2)


def test_steps_may_have_their_own_separator(tmp_path):
  found = data(tmp_path, [solution(steps=("cd;", "e;"))]).rows(Characters())
  at = np.flatnonzero(found[0]["weights"])
  assert [chr(found[0]["tokens"][i]) for i in at] == [";", ";"]
  with pytest.raises(UserError, match=r"steps\[1\]: found ''"):
    rows.encode(solution(steps=("c", "")), Characters())


def test_what_does_not_fit_is_counted(tmp_path):
  longer = solution(steps=("cdefgh", "ijkl"))
  none = solution(labels=(None, None))
  late = solution(steps=("cdefgh", "ijkl"), labels=(None, 0))
  made = data(tmp_path, [solution(), longer, none, late])
  with pytest.warns(RuntimeWarning, match=r"2 of 4 .*; 2 have no label"):
    found = made.rows(Characters())
  assert [int(found[i]["weights"].sum()) for i in range(len(found))] == [2, 1]
  made = data(tmp_path, [none])
  warned = pytest.warns(RuntimeWarning, match="1 have no label")
  with pytest.raises(NoExamples, match="1 solutions, none"), warned:
    made.rows(Characters())
  with pytest.raises(UserError, match="no tokenizer"):
    made.rows(None)


def test_problems_are_in_one_split(tmp_path):
  prompts = [chr(97 + i) for i in range(26)]
  made = data(tmp_path, [solution(prompt=x) for x in prompts for _ in "ab"])
  for split in ("train", "validation", "heldout"):
    own = dataclasses.replace(made, split=split).solutions()
    assert {x.prompt for x in own} == {
      x for x in prompts if split_of(x) == split
    }


def test_labels_end_at_the_first_error_or_go_on():
  one = solution(
    steps=("a", "b", "c", "d"), labels=(1, 0, 1, None), final_correct=False
  )
  assert rows.recorded(one) == (1, 0, 1, None)
  assert rows.truncated(one) == (1, 0, None, None)
  assert rows.unrecovered(one) == (1, 0, 0, 0)
  assert rows.outcome(one) == [0] * 4
  assert rows.outcome(solution()) == [None, None]
  assert rows.unrecovered(solution(labels=(1, None))) == (1, None)


def test_counts_become_labels_of_as_many_rollouts_as_wanted():
  """Fewer of them are a hypergeometric draw: its mean, and P(no success)."""
  counts = MonteCarlo(3, 16), None, MonteCarlo(0, 16), MonteCarlo(1, 1)
  one = solution(steps=("a", "b", "c", "d"), labels=(None,) * 4, mc=counts)
  assert rows.Counted()(one) == (3 / 16, None, 0, 1)
  assert rows.Counted(threshold=0)(one) == (1, None, 0, None)
  assert rows.Counted(threshold=0.5)(one) == (0, None, None, None)
  four = [rows.Counted(rollouts=4, seed=i)(one) for i in range(2000)]
  first = np.array([x[0] for x in four])
  assert set(first) <= {0, 0.25, 0.5, 0.75}
  # 2000 draws of variance 0.031: a standard error of 0.004.
  assert first.mean() == pytest.approx(3 / 16, abs=0.016)
  none = 13 * 12 * 11 * 10 / (16 * 15 * 14 * 13)
  assert (first == 0).mean() == pytest.approx(none, abs=0.044)
  assert all(x[1:] == (None, 0, 1) for x in four)
  assert rows.Counted()(solution()) == (None, None)


def test_a_pipe_is_left_for_the_run_to_read(tmp_path):
  """A check before it would take what can be read only once, or wait."""
  pipe = tmp_path / "pipe"
  os.mkfifo(pipe)
  rows.LabelledRows(paths=str(pipe), length=8, batch_size=1).check_files()


def test_a_prompt_may_be_a_conversation(tmp_path):
  """Which asks the tokenizer for more than ids of texts."""

  class Chats(Characters):
    def chat(self, messages):
      return "<" + messages[0]["content"] + ">"

  asked = data(tmp_path, [solution()], prompting=Chat())
  (row,) = asked.rows(Chats())
  assert "".join(map(chr, row["tokens"][:7])) == "<ab>cde"
