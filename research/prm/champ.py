"""CHAMP: first wrong steps that people marked in solutions of competitions.

Mao, Kim & Zhou 2024, arXiv:2401.06961; the package `champ-dataset`, of which
one JSON file is read and no code is run. Each of 270 problems has two solutions
of language models. People marked the first wrong step as a range of characters
of a text that nobody had cut into steps: here the step in which the range
begins is the first wrong one. What a solution's last line says is not graded:
`final_correct` says whether people found no wrong step.
"""

import dataclasses
import importlib.util
import os
from typing import Any, ClassVar

from research.data.sources.jsonl import Record
from research.errors import UserError
from research.prm.labelled import LabelledSolution, labels_until
from research.ranges import OneOf, Ranged
from research.reasoning.segmentation import SEGMENTERS, Span

PACKAGE = "champ_dataset"
FILE = "dataset_files/v0.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Champ(Ranged):
  """The layout of CHAMP's `v0.json`, which `installed` finds; read only.

  Attributes:
    segmenter: cuts the solutions, of `reasoning.SEGMENTERS`; ProcessBench cuts
      paragraphs as well.
  """

  segmenter: OneOf(*SEGMENTERS) = "blank_line"
  single: ClassVar[bool] = False

  def solutions(self, record: Record) -> list[LabelledSolution]:
    """Returns the solutions, in the file's order.

    `extra` has the problem's `category`, and the `prompting` of the solution,
    such as "No C w/o H": whether its author was given concepts and hints, which
    `prompt`, the problem alone, has not.
    """
    problems = record.get("problems")
    if not isinstance(problems, dict) or not problems:
      raise UserError(
        f"{record.where}: problems: found {type(problems).__name__}, expected"
        " an object with a problem a name: is this CHAMP's v0.json?"
      )
    return [
      solution
      for name, values in problems.items()
      for solution in self._of_problem(
        name, _record(values, record.where, name)
      )
    ]

  def values(self, solution: LabelledSolution) -> dict[str, Any]:
    """Raises UserError: a problem of the file has more than its solutions."""
    raise UserError(
      f"{solution.problem_id}: Champ is read only, expected another layout,"
      " such as Native"
    )

  def _of_problem(self, name: str, problem: Record) -> list[LabelledSolution]:
    marked = _record(
      problem.get("fws_annotations"), problem.where, "fws_annotations"
    )
    solutions = []
    for key, values in marked.values.items():
      annotation = _record(values, marked.where, key)
      text = annotation.text("text")
      spans = SEGMENTERS[self.segmenter].split(text)
      if not spans:
        raise annotation.wrong("text", text, "a solution, not blank")
      first_error = _first_error(annotation, text, spans)
      solutions.append(
        LabelledSolution(
          prompt=problem.text("_text"),
          steps=tuple(text[start:stop] for start, stop in spans),
          labels=labels_until(first_error, len(spans)),
          final_correct=first_error == -1,
          problem_id=name,
          policy_id=annotation.text("author"),
          segmenter_id=self.segmenter,
          label_source="human_first_error",
          extra={
            "category": problem.text("category"),
            "prompting": key.partition("|")[2],
          },
        )
      )
    return solutions


def installed() -> str:
  """Returns the path of the installed package's file.

  Raises:
    UserError: the package is not installed.
  """
  # Its code, which nothing here needs, is not run.
  spec = importlib.util.find_spec(PACKAGE)
  for folder in (spec and spec.submodule_search_locations) or ():
    path = os.path.join(folder, FILE)
    if os.path.isfile(path):
      return path
  raise UserError(
    f"champ.installed: found no {FILE} of a package {PACKAGE}, expected that of"
    " champ-dataset.\nIn Heptad's folder: pip install -e '.[reasoning]'"
  )


def _record(values: object, where: str, name: str) -> Record:
  if not isinstance(values, dict):
    raise UserError(
      f"{where}: {name}: found {type(values).__name__}, expected an object"
    )
  return Record(values, f"{where}: {name}")


def _first_error(annotation: Record, text: str, spans: list[Span]) -> int:
  """Returns the index of the step in which the marked range begins, or -1."""
  start, stop = annotation.get("start_idx"), annotation.get("end_idx")
  if start is None and stop is None:
    return -1
  for name, index, low, high in (
    ("start_idx", start, 0, len(text) - 1),
    ("end_idx", stop, 1, len(text)),
  ):
    if type(index) is not int or not low <= index <= high:
      expected = f"{low} to {high}, or null in both fields"
      raise annotation.wrong(name, index, expected)
  marked = text[start:stop]
  if not marked.strip():
    raise annotation.wrong("end_idx", stop, f"some text between it and {start}")
  # A range that begins with a separator means the step behind it.
  start += len(marked) - len(marked.lstrip())
  return next(i for i, (_, end) in enumerate(spans) if start < end)
