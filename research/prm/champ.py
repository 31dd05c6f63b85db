"""CHAMP: first wrong steps that people marked in solutions of competitions.

Mao, Kim & Zhou 2024, arXiv:2401.06961; the package `champ-dataset`, of which
one JSON file is read and no code is run. Each of 270 problems has two solutions
of language models. People marked the first wrong step as a range of characters
of a text that nobody had cut into steps: here the step in which the range
begins is the first wrong one. What a solution's last line says is not graded.
"""

import dataclasses
import importlib.util
import os
import pathlib

from research.data.sources import jsonl
from research.data.sources.jsonl import Record
from research.errors import UserError
from research.prm.labelled import LabelledSolution, labels_until
from research.reasoning.segmentation import SEGMENTERS, Span

PACKAGE = "champ_dataset"
FILE = "dataset_files/v0.json"

MAX_BYTES = 1 << 28
"""Of the file; version 1.0.0 has 72 MB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Champ:
  """CHAMP's marked solutions.

  Attributes:
    segmenter: cuts the solutions, of `reasoning.SEGMENTERS`; ProcessBench cuts
      paragraphs as well.
    path: of the JSON file; None for that of the installed package.
  """

  segmenter: str = "blank_line"
  path: str | None = None

  def __post_init__(self):
    if self.segmenter not in SEGMENTERS:
      raise UserError(
        f"Champ.segmenter: found {self.segmenter!r}, expected one of"
        f" {', '.join(SEGMENTERS)}"
      )

  def solutions(self) -> list[LabelledSolution]:
    """Returns the solutions, in the file's order.

    `extra` has the problem's `category`, and the `prompting` of the solution,
    such as "No C w/o H": whether its author was given concepts and hints, which
    `prompt`, the problem alone, has not.

    Raises:
      UserError: there is no such package or file, or the file is not CHAMP's.
    """
    path = self.path or installed()
    problems = _read(path).get("problems")
    if not isinstance(problems, dict) or not problems:
      raise UserError(
        f"{path}: problems: found {type(problems).__name__}, expected an object"
        " with a problem a name: is this CHAMP's v0.json?"
      )
    return [
      solution
      for name, values in problems.items()
      for solution in self._of_problem(name, _record(values, path, name))
    ]

  def _of_problem(self, name: str, problem: Record) -> list[LabelledSolution]:
    marked = _record(
      problem.get("fws_annotations"), problem.where, "fws_annotations"
    )
    found = []
    for key, values in marked.values.items():
      one = _record(values, marked.where, key)
      text = one.text("text")
      spans = SEGMENTERS[self.segmenter].split(text)
      if not spans:
        raise one.wrong("text", text, "a solution, not blank")
      found.append(
        LabelledSolution(
          prompt=problem.text("_text"),
          steps=tuple(text[start:stop] for start, stop in spans),
          labels=labels_until(_first_error(one, text, spans), len(spans)),
          problem_id=name,
          policy_id=one.text("author"),
          segmenter_id=self.segmenter,
          label_source="human_first_error",
          extra={
            "category": problem.text("category"),
            "prompting": key.partition("|")[2],
          },
        )
      )
    return found


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
    f"Champ.path: found no {FILE} of a package {PACKAGE}, expected that of"
    " champ-dataset.\nIn Heptad's folder: pip install -e '.[reasoning]'"
  )


def _read(path: str) -> Record:
  try:
    size = os.path.getsize(path)
    if size > MAX_BYTES:
      raise UserError(
        f"{path}: found {size:,} bytes, expected at most {MAX_BYTES:,}"
      )
    text = pathlib.Path(path).read_text("utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path}: cannot be read as UTF-8 ({error})") from error
  return jsonl.parse(text, path)


def _record(values: object, where: str, name: str) -> Record:
  if not isinstance(values, dict):
    raise UserError(
      f"{where}: {name}: found {type(values).__name__}, expected an object"
    )
  return Record(values, f"{where}: {name}")


def _first_error(one: Record, text: str, spans: list[Span]) -> int:
  """Returns the index of the step in which the marked range begins, or -1."""
  start, stop = one.get("start_idx"), one.get("end_idx")
  if start is None and stop is None:
    return -1
  for name, found, low, high in (
    ("start_idx", start, 0, len(text) - 1),
    ("end_idx", stop, 1, len(text)),
  ):
    if type(found) is not int or not low <= found <= high:
      expected = f"{low} to {high}, or null in both fields"
      raise one.wrong(name, found, expected)
  marked = text[start:stop]
  if not marked.strip():
    raise one.wrong("end_idx", stop, f"some text between it and {start}")
  # A range that begins with a separator means the step behind it.
  start += len(marked) - len(marked.lstrip())
  return next(i for i, (_, end) in enumerate(spans) if start < end)
