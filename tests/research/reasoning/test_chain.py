"""Chains of sums, against Python's arithmetic and reasoning-gym's scorer."""

import pytest

from research.errors import UserError
from research.reasoning import Problem, first_error
from research.reasoning.tasks import Chain

TASK = Chain()
PROBLEM = Problem("x", "12 + 47 - 30 =", answer="29")
STEPS = ["12 + 47 = 59 ;", "59 - 30 = 29 ;"]


def test_answers_are_what_the_text_says():
  data = pytest.importorskip("reasoning_gym").create_dataset(
    "chain_sum", seed=0, size=1
  )
  for problem in TASK[:50]:
    expression = problem.prompt.removesuffix(" =")
    assert len(expression.split()) == 15
    value = eval(expression, {"__builtins__": {}})
    assert problem.answer == str(value)
    verdict = TASK.verify(problem, TASK.oracle(problem))
    assert verdict.correct
    assert data.score_answer(verdict.canonical, problem.to_json()) == 1
    for step in TASK.solution(problem):
      left, right = step.removesuffix(" ;").split(" = ")
      assert eval(left, {"__builtins__": {}}) == int(right)


def test_the_first_wrong_step_is_found_wherever_it_is():
  problem = TASK[0]
  solution = TASK.solution(problem)
  assert first_error(TASK, problem, solution) == -1
  for i, step in enumerate(solution):
    left, _, total = step.removesuffix(" ;").rpartition(" ")
    wrong = [*solution]
    wrong[i] = f"{left} {int(total) + 1} ;"
    assert first_error(TASK, problem, wrong) == i
    later = TASK.verify_step(problem, wrong[: i + 1], solution[-1])
    assert later.label == "error"


@pytest.mark.parametrize(
  ("step", "reason"),
  [
    ("12 + 47 = 59 ;", ""),
    (" 12 + 47 = 59 ;\n", ""),
    ("12 + 47 = 58 ;", "expected '12 + 47 = 59 ;'"),
    ("12 + 30 = 42 ;", "expected"),
    ("47 + 12 = 59 ;", "expected"),
    ("59", "not a step"),
    ("", "not a step"),
  ],
)
def test_verify_step(step, reason):
  found = TASK.verify_step(PROBLEM, [], step)
  assert found.label == ("error" if reason else "ok")
  assert reason in found.reason


def test_a_step_too_many_is_an_error():
  found = TASK.verify_step(PROBLEM, STEPS, "29 + 1 = 30 ;")
  assert (found.label, found.reason) == ("error", "the sum is complete")


@pytest.mark.parametrize(
  ("text", "canonical", "correct"),
  [
    (" ".join(STEPS), "29", True),
    (" ".join(STEPS) + " <eos>", "29", True),
    ("59 - 30 = 029 ;", "29", True),
    ("12 + 47 = 59 ;", "59", False),
    ("59 - 30 = 29 or 30 ;", None, False),
    ("29", None, False),
    ("", None, False),
    (None, None, False),
  ],
)
def test_verify(text, canonical, correct):
  found = TASK.verify(PROBLEM, text)
  assert (found.canonical, found.correct) == (canonical, correct)


def test_totals_stay_in_their_range():
  task = Chain(terms=(3, 5), totals=(0, 99), count=30)
  for problem in task:
    totals = [int(x.split()[-2]) for x in task.solution(problem)]
    assert all(0 <= x <= 99 for x in totals)
    assert 2 <= len(totals) <= 4


def test_splits_share_no_problem():
  held = {x.prompt for x in Chain(terms=(2, 2), split="heldout", count=300)}
  train = {x.prompt for x in Chain(terms=(2, 2), count=2000)}
  assert not held & train


def test_settings_are_checked():
  with pytest.raises(UserError, match=r"Chain.terms: found 1 to 3"):
    Chain(terms=(1, 3))
  with pytest.raises(UserError, match=r"Chain.operators: found '\*'"):
    Chain(operators="*")
  with pytest.raises(UserError, match="chain: found the prompt 'what"):
    TASK.solution(Problem("x", "what is 3 + 4?"))
