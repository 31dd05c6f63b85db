r"""Questions with answers in JSON Lines: GSM8K, MATH, and a user's own.

`gsm8k(path)` and `math(path)` read these sets as they are published; any other
file is an `AnswerFile` that names its fields, an extractor and a grader.
"""

import dataclasses
import functools
import os
import pathlib
from typing import ClassVar

from research.data.sources import Paths, expand, jsonl
from research.errors import UserError
from research.ranges import NonNegativeInt, OneOf
from research.reasoning import extraction
from research.reasoning.extraction import Extractor
from research.reasoning.grading import ExactMatch, Grader, Ladder, judge
from research.reasoning.problem import Problem, Verdict
from research.reasoning.tasks.task import Task

QWEN = (
  "{question}\nPlease reason step by step, and put your final answer within"
  " \\boxed{{}}."
)
"""The prompt of Qwen2.5-Math."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerFile(Task):
  """Problems of a file, an object a line.

  Attributes:
    path: files, as `research.data.sources.expand` reads them.
    count: number of problems; None for all.
    question: dotted path of the field with the question.
    answer: path of the field with the answer, or with a solution that has it;
      None for questions without answers, which `verify` refuses.
    difficulty: path of a field with a number, or None.
    identity: path of a field with an id that no other line has; None for the
      line's number, behind the file's name, and its folder's where names are
      equal.
    template: the prompt, with `{question}` in it.
    reference: finds the answer in the field `answer`.
    extract: finds the answer in a model's text.
    shown: an answer as such a text, with `{answer}` in it.
    grader: compares the two.
    parts: "all" gives every split the whole file, which is itself one; "hash"
      splits the lines by the hash of their question.
  """

  NAME: ClassVar[str] = "answers"

  path: Paths
  count: NonNegativeInt | None = None
  question: str = "question"
  answer: str | None = "answer"
  difficulty: str | None = None
  identity: str | None = None
  template: str = "{question}"
  reference: Extractor = extraction.whole
  extract: Extractor = extraction.boxed_or_phrase
  shown: str = "The answer is \\boxed{{{answer}}}."
  grader: Grader = Ladder()
  parts: OneOf("all", "hash") = "all"

  def __post_init__(self):
    if isinstance(self.path, list):
      object.__setattr__(self, "path", tuple(self.path))
    super().__post_init__()
    available = len(self._records)
    if self.count is None:
      object.__setattr__(self, "count", available)
    if self.count > available:
      raise UserError(
        f"{self.path}: found {available} problems, expected {self.count}; lower"
        " count."
      )

  @property
  def _records(self) -> tuple[jsonl.Record, ...]:
    split = self.split if self.parts == "hash" else None
    return _read(self.path, split, self.question)

  def problem(self, index: int) -> Problem:
    """Returns the problem of a line.

    Raises:
      UserError: a field is missing, or the answer is not in its field.
    """
    record = self._records[index]
    solution, answer = self._answer(record)
    identity = record.get(self.identity) if self.identity else None
    return Problem(
      id=str(identity) if identity is not None else self._place(record),
      prompt=self.template.format(question=record.text(self.question)),
      answer=answer,
      meta={"solution": solution},
      difficulty=self._difficulty(record),
    )

  def _answer(self, record: jsonl.Record) -> tuple[str, str | None]:
    """Returns the text of the field `answer`, and the answer in it."""
    if self.answer is None:
      return "", None
    solution = record.get(self.answer)
    if isinstance(solution, int | float) and not isinstance(solution, bool):
      solution = str(solution)
    if not isinstance(solution, str):
      raise record.wrong(self.answer, solution, "text or a number")
    answer = self.reference(solution)
    if answer is None:
      raise record.wrong(self.answer, solution, "text with an answer in it")
    return solution, answer

  def _place(self, record: jsonl.Record) -> str:
    """Returns `file.jsonl:3` of a line, wherever the file lies."""
    file, _, line = record.where.rpartition(":")
    return f"{_names(self.path)[file]}:{line}"

  def _difficulty(self, record: jsonl.Record) -> float | int | None:
    if self.difficulty is None:
      return None
    level = record.get(self.difficulty)
    if isinstance(level, str):  # MATH has "Level 5"
      digits = level.removeprefix("Level ")
      level = float(digits) if digits.isdigit() else None
    if isinstance(level, bool) or not isinstance(level, int | float | None):
      raise record.wrong(self.difficulty, level, "a number")
    return level

  def require_answers(self) -> None:
    if self.answer is None:
      raise UserError(
        "AnswerFile.answer: found None, expected the field with the answers:"
        " without them no text can be judged. A reward of your own needs none:"
        " VerifiedTask.reward_fn, REWARD in runs/data/rewarded.gin."
      )

  def present(self, answer: str) -> str:
    """Returns an answer as the text of a model that found it."""
    return self.shown.format(answer=answer)

  def verify(self, problem: Problem, text: str | None) -> Verdict:
    """Returns whether the answer in the text is that of the file.

    Raises:
      UserError: the file has no answers.
    """
    self.require_answers()
    return judge(text, problem.answer, self.extract, self.grader)


def gsm8k(path: Paths, **fields) -> AnswerFile:
  """Returns GSM8K's `test.jsonl`, graded as lm-evaluation-harness does.

  `fields` may replace any, as `extract=extraction.gsm8k_strict`.
  """
  return AnswerFile(
    **{
      "path": path,
      "template": "Question: {question}\nAnswer:",
      "reference": extraction.gsm8k_strict,
      "extract": extraction.gsm8k_flexible,
      "shown": "#### {answer}",
      "grader": ExactMatch(),
      **fields,
    }
  )


def math(path: Paths, **fields) -> AnswerFile:
  r"""Returns MATH or MATH-500: `problem`, `solution` with a box, `level`."""
  return AnswerFile(
    **{
      "path": path,
      "question": "problem",
      "answer": "solution",
      "difficulty": "level",
      "template": QWEN,
      "reference": extraction.boxed,
      "extract": extraction.boxed,
      **fields,
    }
  )


@functools.lru_cache(maxsize=8)
def _read(path: Paths, split: str | None, key: str) -> tuple[jsonl.Record, ...]:
  return tuple(jsonl.read(path, split, key))


@functools.lru_cache(maxsize=8)
def _names(path: Paths) -> dict[str, str]:
  """Returns the name of each file, with folders if two have the same one."""
  files = {x: pathlib.Path(x).absolute() for x in expand(path)}
  if len({x.name for x in files.values()}) == len(set(files.values())):
    return {file: x.name for file, x in files.items()}
  folder = os.path.commonpath(files.values())
  return {file: x.relative_to(folder).as_posix() for file, x in files.items()}
