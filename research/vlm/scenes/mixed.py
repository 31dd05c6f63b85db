"""Several tasks as one: other questions, or other numbers of images.

Tasks take turns, so any part of the samples has equal shares of them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, overload

from research.typing import UserError
from research.vlm.images.resize import Size
from research.vlm.scenes.rules import BestGiven, PerSample, Rule
from research.vlm.scenes.sample import Sample
from research.vlm.scenes.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed(Sequence[Sample]):
  """The samples of some tasks in turns, as many of each.

  Attributes:
    tasks: at least one; of each the first samples are taken, as many as the
      shortest has.
  """

  tasks: tuple[Task, ...]

  def __post_init__(self):
    if not self.tasks:
      raise UserError("Mixed.tasks: found none, expected at least one.")

  def __len__(self) -> int:
    return len(self.tasks) * min(map(len, self.tasks))

  @overload
  def __getitem__(self, index: int) -> Sample: ...
  @overload
  def __getitem__(self, index: slice) -> list[Sample]: ...

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    task, number = self._at(index)
    return task[number]

  def drawn(self, index: int) -> Sample:
    task, number = self._at(index)
    return task.drawn(number)

  def outline(self, index: int) -> tuple[Sample, tuple[Size, ...]]:
    task, number = self._at(index)
    return task.outline(number)

  def rules(self, samples: int = 2048) -> dict[str, Rule]:
    """Returns the tasks' rule baselines, each for its own task's kinds.

    Args:
      samples: that rules which count answers count, of all tasks.
    """
    tasks = tuple(
      dataclasses.replace(x, split="train", seed=x.seed + 1, count=samples)
      for x in self.tasks
    )
    known = dataclasses.replace(self, tasks=tasks)
    drawn = [known.drawn(i) for i in range(samples)]
    found: dict[str, Any] = {}
    for task in self.tasks:
      for name, rule in task.RULES.items():
        name, kinds = _name(found, name, rule, task), rule.kinds or task.KINDS
        before = found[name].kinds if name in found else ()
        kinds = tuple(dict.fromkeys((*before, *kinds)))
        found[name] = dataclasses.replace(rule, kinds=kinds)
    return {
      name: rule.fit(drawn) if isinstance(rule, BestGiven) else rule
      for name, rule in found.items()
    }

  def _at(self, index: int) -> tuple[Task, int]:
    number, turn = divmod(range(len(self))[index], len(self.tasks))
    return self.tasks[turn], number


def _name(
  found: dict[str, Any], name: str, rule: PerSample | BestGiven, task: Task
) -> str:
  """Returns the rule's name, with its task's where another rule has it."""
  if name not in found or _function(found[name]) is _function(rule):
    return name
  return f"{name} ({type(task).__name__})"


def _function(rule: PerSample | BestGiven) -> Any:
  return rule.answer if isinstance(rule, PerSample) else rule.information
