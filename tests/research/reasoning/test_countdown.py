"""Countdown's oracles, against searches written another way."""

import functools
import itertools
import random

import pytest

from research.errors import UserError
from research.reasoning import Problem, first_error
from research.reasoning.tasks import Countdown, countdown

TASK = Countdown()


def make(numbers, target):
  """Returns a problem."""
  return Problem("x", f"{' '.join(map(str, numbers))} > {target} >")


def by_subsets(numbers, largest, operators):
  """Returns what can be made of all numbers: one tree a pair of subsets."""
  full = (1 << len(numbers)) - 1

  @functools.cache
  def made(subset):
    members = [i for i in range(len(numbers)) if subset >> i & 1]
    if len(members) == 1:
      return {numbers[members[0]]}
    found, left = set(), (subset - 1) & subset
    while left:
      for a, b in itertools.product(made(left), made(subset ^ left)):
        results = {"+": a + b, "-": a - b, "*": a * b}
        found |= {results[x] for x in operators}
      left = (left - 1) & subset
    return {x for x in found if 0 <= x <= largest}

  return made(full)


@pytest.mark.parametrize("operators", ["+-*", "+-"])
def test_reachable_is_what_every_tree_makes(operators):
  task = Countdown(operators=operators)
  rng = random.Random(0)
  for _ in range(40):
    numbers = [rng.randint(0, 15) for _ in range(rng.randint(1, 4))]
    expected = by_subsets(tuple(numbers), 199, operators)
    assert task.reachable(numbers) == expected, numbers


def all_traces(task, left):
  """Yields every legal trace, by trying all pairs in all orders."""
  if len(left) == 1:
    yield (), left[0]
    return
  for i, j in itertools.permutations(range(len(left)), 2):
    rest = [x for k, x in enumerate(left) if k not in (i, j)]
    for sign in task.operators:
      c = {"+": left[i] + left[j], "-": left[i] - left[j]}.get(
        sign, left[i] * left[j]
      )
      if 0 <= c <= task.largest:
        words = [left[i], sign, left[j], "=", c, *rest, ";"]
        for steps, end in all_traces(task, [c, *rest]):
          yield (" ".join(map(str, words)), *steps), end


@pytest.mark.parametrize("numbers", [(3, 5, 7), (0, 4, 4)])
def test_oracles_agree_with_all_traces(numbers):
  """Every legal trace, every prefix of it, and every target around."""
  task = Countdown(numbers=3)
  traces = list(all_traces(task, list(numbers)))
  ends = {end for _, end in traces}
  for target in (*sorted(ends)[::3], 150):
    problem = make(numbers, target)
    good = {steps for steps, end in traces if end == target}
    alive = {steps[:n] for steps in good for n in range(len(steps) + 1)}
    for steps, end in traces:
      verdict = task.verify(problem, " ".join(steps))
      assert verdict.correct == (end == target)
      for n, step in enumerate(steps):
        found = task.verify_step(problem, steps[:n], step)
        assert (found.label == "ok") == (steps[: n + 1] in alive)
      assert (first_error(task, problem, steps) == -1) == (end == target)
    solutions = list(map(tuple, task.solutions(numbers, target)))
    assert len(set(solutions)) == len(solutions)
    larger_first = {
      x for x in good if all(int(s.split()[0]) >= int(s.split()[2]) for s in x)
    }
    assert set(solutions) == larger_first


def test_reasoning_gym_accepts_the_expressions():
  """Its scorer of countdown, and Python's arithmetic, judge our answers."""
  reasoning_gym = pytest.importorskip("reasoning_gym")
  data = reasoning_gym.create_dataset("countdown", seed=0, size=1)
  for problem in TASK[:25]:
    numbers, target = countdown.parse_prompt(problem.prompt)
    expression = TASK.verify(problem, TASK.oracle(problem)).canonical
    assert eval(expression, {"__builtins__": {}}) == target
    entry = {"metadata": {"numbers": list(numbers), "target": target}}
    assert data.score_answer(expression, entry) == 1


@pytest.mark.parametrize(
  ("step", "reason"),
  [
    ("7 + 5 = 12 3 12 ;", ""),
    ("7 + 5 = 12 12 3 ;", ""),  # the others are copied, in another order
    ("12 - 7 = 6 3 5 ;", "12 - 7 is 5, not 6"),
    ("12 - 8 = 4 3 5 ;", "12 and 8 are not both there"),
    ("5 + 5 = 10 3 7 12 ;", "5 and 5 are not both there"),
    ("12 - 7 = 5 3 ;", "the other numbers are not copied"),
    ("12 - 7 = 5 3 5 7 ;", "the other numbers are not copied"),
    ("5 - 7 = -2 3 12 ;", "not a step"),
    ("3 - 5 = 2 7 12 ;", "-2 is not within 0 to 199"),
    ("12 / 3 = 4 5 7 ;", "not a step"),
    ("12 - 7 = 5 3 5", "not a step"),
    ("", "not a step"),
    ("12  - 7 = 5 3 5 ;", "not a step"),
    ("__import__('os') ;", "not a step"),
    ("12 - 7 = 5 3 5 ;", "24 cannot be made of what is left"),
  ],
)
def test_verify_step_names_the_first_rule_that_is_broken(step, reason):
  problem = make((3, 5, 7, 12), 24)
  found = TASK.verify_step(problem, [], step)
  assert found.label == ("error" if reason else "ok")
  assert reason in found.reason


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    (None, "no answer"),
    ("", "no answer"),
    ("  \n", "no answer"),
    ("12 - 7 = 5 3 5 ; 5 * 3 = 15 5 ;", "wrong: 2 numbers left"),
    # It ends at the target, by its arithmetic alone.
    ("12 - 7 = 5 3 5 ; 5 * 3 = 15 5 ; 15 + 5 = 24 ;", "wrong: 15 + 5 is 20"),
    ("12 - 7 = 5 3 5 ; 5 * 3 = 15 5 ; 15 - 5 = 10 ;", "wrong: 10"),
    ("12 - 7 = 5 3 5 ; 5 * 3 = 15 5 ; 15 - 5 = 10 ; 10 + 14 = 24 ;", "10 and"),
    ("12 + 12 = 24 ;", "not both there"),
    ("24", "not a step"),
    ("12 - 7 = 5 3 5 ; 5 * 3 = 15 5 ; 15 + 9 = 24 ;", "not both there"),
  ],
)
def test_verify_rejects(text, reason):
  found = TASK.verify(make((3, 5, 7, 12), 24), text)
  assert not found.correct
  assert reason in found.reason
  assert (found.extracted is None) == found.reason.startswith("no answer")
  assert (found.canonical is None) == (found.extracted is None)


def test_equal_expressions_have_one_canonical_form():
  problem = make((2, 3, 4), 20)
  texts = ("3 + 2 = 5 4 ; 5 * 4 = 20 ;", "2 + 3 = 5 4 ; 4 * 5 = 20 ; <eos>")
  found = {TASK.verify(problem, x).canonical for x in texts}
  assert found == {"((2+3)*4)"} or found == {"(4*(2+3))"} or len(found) == 1
  assert all(TASK.verify(problem, x).correct for x in texts)


def test_copies_in_another_order_keep_their_expressions():
  problem = make((1, 2, 3, 4), 14)
  text = "4 * 3 = 12 2 1 ; 2 * 1 = 2 12 ; 12 + 2 = 14 ;"
  found = TASK.verify(problem, text)
  assert found.correct
  assert eval(found.canonical, {"__builtins__": {}}) == 14
  assert found.canonical == "((1*2)+(3*4))"


def test_problems_are_solvable_distinct_and_in_one_split():
  splits = {
    split: Countdown(split=split, count=3000).distinct(60)
    for split in ("train", "validation", "heldout")
  }
  keys = {
    split: {TASK.key(x) for x in found} for split, found in splits.items()
  }
  for one, other in itertools.combinations(keys.values(), 2):
    assert not one & other
  for problem in splits["heldout"]:
    numbers, target = countdown.parse_prompt(problem.prompt)
    assert all(1 <= x <= 12 for x in numbers)
    assert 10 <= target <= 99
    assert len(numbers) == 4
    assert TASK.solvable(numbers, target)
    assert first_error(TASK, problem, problem.meta["solution"]) == -1
  assert len({x.prompt for x in splits["heldout"]}) == 60
  # The same set, in any order of the numbers, is of the same split.
  shuffled = make((12, 3, 7, 5), 24)
  assert TASK.key(shuffled) == TASK.key(make((3, 5, 7, 12), 24))


def test_seeds_share_no_problems():
  """reasoning-gym's do: its seed 1 is seed 0, shifted by one."""
  one = {x.prompt for x in Countdown(count=200)}
  other = {x.prompt for x in Countdown(count=200, seed=1)}
  assert len(one & other) < 5
  assert Countdown(count=5)[:] == Countdown(count=9)[:5]


def test_words_are_the_tokens_of_every_trace():
  words = countdown.vocabulary()
  assert len(words) == len(set(words)) == 208
  for problem in TASK[:20]:
    text = f"{problem.prompt} {TASK.oracle(problem)} <eos>"
    assert len(text.split()) == 7 + 8 + 7 + 6 + 1
    assert set(text.split()) <= set(words)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"values": (5, 3)}, "Countdown.values: found 5 to 3"),
    ({"targets": (10, 999)}, "Countdown.targets: found 10 to 999"),
    ({"operators": "+/"}, "Countdown.operators"),
  ],
)
def test_settings_are_checked(fields, message):
  with pytest.raises(UserError, match=message):
    Countdown(**fields)


def test_settings_that_admit_no_problem_are_an_error():
  with pytest.raises(UserError, match="no problem of split"):
    Countdown(values=(1, 1), targets=(90, 99)).problem(0)
  with pytest.raises(UserError, match=r"found \d different problems among 60"):
    Countdown(numbers=2, values=(5, 6), targets=(10, 12), count=60).distinct(50)
