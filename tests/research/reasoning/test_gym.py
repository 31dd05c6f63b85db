"""reasoning-gym behind its rules: each trap of it is shown, and avoided."""

import importlib.metadata
import json
import pathlib

import pytest

from research.errors import UserError
from research.reasoning import Isolated
from research.reasoning.tasks import Gym, gym

reasoning_gym = pytest.importorskip("reasoning_gym")
CHAIN = {"min_terms": 2, "max_terms": 3}


def chain(**fields):
  """Returns the task of sums, of which wrong answers get partial credit."""
  return Gym(name="chain_sum", config=CHAIN, **fields)


def test_another_seed_is_the_same_set_shifted():
  """The trap: a test split by seed would be the training set."""
  one, other = (
    reasoning_gym.create_dataset("chain_sum", seed=seed, size=100)
    for seed in (0, 1)
  )
  questions = [{x[i]["question"] for i in range(100)} for x in (one, other)]
  assert len(questions[0] & questions[1]) >= 99


def test_splits_are_ranges_of_indices_of_one_seed():
  tasks = [
    chain(split=split, size=1000, count=100)
    for split in ("train", "validation", "heldout")
  ]
  indices = [{x.meta["index"] for x in task} for task in tasks]
  assert indices[0] == set(range(100))
  assert indices[1] == set(range(800, 900))
  assert indices[2] == set(range(900, 1000))
  with pytest.raises(UserError, match="has 100 indices; raise size, 1000"):
    chain(split="heldout", size=1000, count=101)


def test_our_seeds_share_no_items():
  one, other = (
    {x.prompt for x in chain(count=100, seed=seed)} for seed in (0, 1)
  )
  assert len(one & other) < 3
  with pytest.raises(UserError, match="Gym.seed: found 300000, expected 0 to"):
    chain(seed=300_000)


def test_small_settings_repeat_questions_and_distinct_drops_them():
  """Ranges of indices do not help where there are 200 questions in all."""
  settings = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
  train, held = (
    Gym(name="chain_sum", config=settings, split=split, count=1000)
    for split in ("train", "heldout")
  )
  seen = {x.prompt for x in train}
  assert len(seen) < 250
  assert {x.prompt for x in held} & seen
  with pytest.raises(UserError, match="different problems among 1000"):
    held.distinct(100, excluding=seen)
  assert len({x.prompt for x in train.distinct(50)}) == 50


def test_a_partial_score_is_not_correct():
  task = chain(count=50)
  problem = next(x for x in task if len(x.answer) == 2)
  padded = f"1{problem.answer}"
  assert 0 < task.score(problem, padded) < 1
  found = task.verify(problem, f"<answer>{padded}</answer>")
  assert not found.correct
  assert found.reason.startswith("wrong: score 0.")
  # Only what a tag has is an answer, and the last one is.
  assert task.verify(problem, problem.answer).reason == "no answer"
  assert task.verify(problem, None).canonical is None
  text = f"<answer>{padded}</answer> or <answer> {problem.answer} </answer>"
  found = task.verify(problem, text)
  assert (found.correct, found.canonical) == (True, problem.answer)


@pytest.mark.parametrize(
  "name", ["mini_sudoku", "knights_knaves", "number_sequence", "puzzle24"]
)
def test_verdicts_are_full_scores_of_the_scorer(name):
  task = Gym(name=name, count=5)
  data = reasoning_gym.create_dataset(name, seed=0, size=20_000)
  for problem in task:
    entry = data[problem.meta["index"]]
    assert problem.prompt.startswith(entry["question"])
    for text in (task.oracle(problem), task.mutated(problem)):
      answer = text.removeprefix("<answer>").removesuffix("</answer>")
      score = data.score_answer(answer, entry)
      assert task.verify(problem, text).correct == (score >= 1)
    assert task.verify(problem, task.oracle(problem)).correct


def test_a_scorer_that_raises_or_returns_nan_scores_zero():
  class Raising:
    """Does what the answer says."""

    def score_answer(self, answer, entry):
      return float(answer)

  assert gym._score(Raising(), {}, "0.5") == 0.5
  assert gym._score(Raising(), {}, "nan") == 0
  assert gym._score(Raising(), {}, "inf") == 0
  assert gym._score(Raising(), {}, "x") == 0
  assert gym._score(Raising(), {}, None) == 0


def code_that_leaves(file):
  """Returns Python that makes a file."""
  return f"__import__('pathlib').Path({str(file)!r}).touch()"


def test_reasoning_gyms_scorers_run_answers_and_ours_do_not(tmp_path):
  data = reasoning_gym.create_dataset("countdown", seed=0, size=1)
  theirs, ours = tmp_path / "theirs", tmp_path / "ours"
  data.score_answer(code_that_leaves(theirs), data[0])
  assert theirs.exists()  # the trap
  task = Gym(name="countdown", count=1)
  code = code_that_leaves(ours)
  found = task.verify(task[0], f"<answer>{code}</answer>")
  assert (found.correct, found.reason) == (False, "wrong: score 0")
  assert not ours.exists()
  for huge in ("9**9**9**9", "9//0", "1" * 300, "9" + "*9" * 150):
    assert task.score(task[0], huge) == 0
  assert task.verify(task[0], task.oracle(task[0])).correct


@pytest.mark.parametrize(
  ("name", "why"),
  [
    ("string_insertion", "evaluates answers as code"),
    ("graph_color", "no reference answer"),
    ("game_of_life_halting", "accepts"),
    ("word_ladder", "seed of Python's hashes"),
    ("no_such", "it is no data set"),
  ],
)
def test_what_failed_the_self_test_is_refused(name, why):
  with pytest.raises(UserError, match=why):
    Gym(name=name)


def test_the_list_is_of_the_version_that_is_installed():
  path = pathlib.Path(gym.__file__).with_name("allowed.json")
  found = json.loads(path.read_text("utf-8"))
  assert found["reasoning_gym"] == importlib.metadata.version("reasoning-gym")
  names = {*found["allowed"], *found["refused"]}
  assert names == set(reasoning_gym.factory.DATASETS)
  assert len(found["allowed"]) > 80
  for name in ("chain_sum", "countdown", "gsm_symbolic", "tower_of_hanoi"):
    assert name in gym.allowed()


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("chain_sum", ""),
    ("countdown", ""),
    ("prime_factorization", ""),
    ("binary_matrix", "evaluates answers as code"),
    ("game_of_life_halting", "accepts"),
    ("boxnet", "no reference answer"),
  ],
)
def test_self_test(name, expected):
  found = gym.self_test(name, problems=2)
  assert expected in found if expected else found == ""


@pytest.mark.slow
def test_the_list_is_what_the_self_test_says():
  for name in gym.allowed():
    assert gym.self_test(name) == ""
  for name, why in gym.refused().items():
    if "hashes" not in why:
      assert gym.self_test(name) == why


@pytest.mark.slow
def test_scoring_in_another_process_is_the_same():
  task = chain(count=3)
  isolated = Isolated(task, seconds=60)
  for problem in task:
    for text in (task.oracle(problem), task.mutated(problem), "", None):
      assert isolated.verify(problem, text) == task.verify(problem, text)


def test_settings_that_reasoning_gym_refuses_are_the_users_error():
  for config in ({"min_terms": 0}, {"no_such": 1}):
    with pytest.raises(UserError, match="refuses the settings of chain_sum"):
      Gym(name="chain_sum", config=config)[0]
