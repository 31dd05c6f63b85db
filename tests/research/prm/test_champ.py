"""CHAMP's marked solutions in steps, against a file of its layout."""

import importlib.util
import json
import pathlib

import pytest

from research.data.sources import split_of
from research.prm import formats, rows
from research.prm.champ import Champ, installed
from research.reasoning.segmentation import SEGMENTERS, steps_of
from research.typing import UserError

TEXT = "First, n = 3.\n\nThen 2n = 7.\nSo 7.\n\n\nThe answer is 7."
WRONG = TEXT.index("2n = 7")


def annotation(**changes):
  values = dict(
    text=TEXT, start_idx=WRONG, end_idx=WRONG + 6, author="GPT-4 Turbo"
  )
  return values | changes


def written(tmp_path, *annotations, prompts=("What is 2n?",)):
  """Returns the path of a file of problems, each with these annotations."""
  problems = {
    f"P_{i}": {
      "_text": prompt,
      "category": "Sequence",
      "fws_annotations": {f"M|{i}": x for i, x in enumerate(annotations)},
    }
    for i, prompt in enumerate(prompts, 1)
  }
  path = tmp_path / "v0.json"
  path.write_text(json.dumps({"problems": problems, "concepts": {}}), "utf-8")
  return str(path)


def installed_as(tmp_path, monkeypatch, prompts=("What is 2n?",)):
  """Makes a package of problems, one solution right and one wrong of each."""
  folder = tmp_path / "champ_dataset" / "dataset_files"
  folder.mkdir(parents=True)
  (folder.parent / "__init__.py").write_text("raise SystemError('run')")
  right = annotation(start_idx=None, end_idx=None)
  written(folder, annotation(), right, prompts=prompts)
  monkeypatch.syspath_prepend(str(tmp_path))


def test_a_marked_range_makes_its_step_the_first_wrong_one(tmp_path):
  path = written(
    tmp_path, annotation(), annotation(start_idx=None, end_idx=None)
  )
  wrong, right = formats.read(path, Champ())
  assert wrong.steps == (
    *("First, n = 3.\n\n", "Then 2n = 7.\nSo 7.\n\n\n", "The answer is 7."),
  )
  assert wrong.labels == (1, 0, None) and right.labels == (1, 1, 1)
  assert wrong.prompt == "What is 2n?" and wrong.problem_id == "P_1"
  assert wrong.policy_id == "GPT-4 Turbo"
  assert (wrong.final_correct, right.final_correct) == (False, True)
  assert wrong.label_source == "human_first_error"
  assert right.extra == {"category": "Sequence", "prompting": "1"}


@pytest.mark.parametrize("name", ["blank_line", "newline", "whole"])
def test_every_start_lies_in_its_step(tmp_path, name):
  """Of every character; a range that begins with blanks means what follows."""
  starts = range(len(TEXT))
  marks = [annotation(start_idx=i, end_idx=len(TEXT)) for i in starts]
  found = formats.read(written(tmp_path, *marks), Champ(segmenter=name))
  steps = steps_of(SEGMENTERS[name], TEXT)
  for i, solution in zip(starts, found, strict=True):
    assert list(solution.steps) == steps
    # In the text from this step on, without blanks, the range is still whole;
    # from the next step on it is not.
    meant = TEXT[i:].lstrip()
    first = solution.first_error
    assert "".join(steps[first:]).endswith(meant)
    assert len("".join(steps[first + 1 :])) < len(meant)


def test_its_problems_are_split_and_its_outcomes_learned(tmp_path):
  right = annotation(start_idx=None, end_idx=None)
  prompts = [f"What is {i}n?" for i in range(40)]
  path = written(tmp_path, annotation(), right, prompts=prompts)
  data = {
    split: rows.LabelledRows(
      paths=path, format=Champ(), labels=rows.outcome, split=split
    )
    for split in ("train", "heldout")
  }
  for split, part in data.items():
    part.check_files()
    solutions = part.solutions()
    names = [x for x in prompts if split_of(x) == split]
    assert [x.prompt for x in solutions] == [x for x in names for _ in "ab"]
    learned = [part.labels(x) for x in solutions]
    assert learned == [[0, 0, 0], [1, 1, 1]] * len(names)


def test_it_is_read_only(tmp_path):
  solutions = formats.read(written(tmp_path, annotation()), Champ())
  with pytest.raises(UserError, match="P_1: Champ is read only"):
    formats.write(str(tmp_path / "copy.json"), solutions, Champ())


@pytest.mark.parametrize(
  ("changes", "found"),
  [
    ({"start_idx": -1}, "start_idx.*-1"),
    ({"start_idx": len(TEXT)}, "start_idx"),
    ({"start_idx": True}, "start_idx.*bool"),
    ({"start_idx": None}, "start_idx"),
    ({"end_idx": None}, "end_idx"),
    ({"end_idx": len(TEXT) + 1}, "end_idx"),
    ({"end_idx": WRONG}, "end_idx.*some text"),
    ({"start_idx": 13, "end_idx": 15}, "end_idx.*some text"),
    ({"text": " \n"}, "text.*not blank"),
    ({"text": 3}, "text.*int"),
    ({"author": None}, "author"),
  ],
)
def test_what_is_not_of_the_layout_is_refused_by_its_field(
  tmp_path, changes, found
):
  path = written(tmp_path, annotation(**changes))
  with pytest.raises(UserError, match=f"(?s)v0.json: P_1.*M.0.*{found}"):
    formats.read(path, Champ())


def test_files_of_other_sorts_are_refused(tmp_path):
  path = tmp_path / "v0.json"
  path.write_text('{"problems": []}', "utf-8")
  with pytest.raises(UserError, match="problems: found list"):
    formats.read(str(path), Champ())
  path.write_text('{"problems": {"P": 3}}', "utf-8")
  with pytest.raises(UserError, match="P: found int"):
    formats.read(str(path), Champ())
  with pytest.raises(UserError, match="cannot be read"):
    formats.read(str(tmp_path / "none.json"), Champ())


def test_the_package_is_found_and_not_run(tmp_path, monkeypatch):
  """A package's folder is enough, whatever its code does."""
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  with pytest.raises(UserError, match=r"pip install -e '.\[reasoning\]'"):
    installed()
  monkeypatch.undo()
  installed_as(tmp_path, monkeypatch)
  assert formats.read(installed(), Champ())[0].first_error == 1
  pathlib.Path(installed()).unlink()
  with pytest.raises(UserError, match="champ-dataset"):
    installed()
