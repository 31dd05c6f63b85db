"""Reasoning tasks as rows and rewards, against the tasks' own verifiers."""

import numpy as np
import pytest

from research.reasoning.tasks import Chain, Countdown, chain, countdown
from research.reasoning.words import EOS, WordVocabulary
from research.training.alignment import rewarded_task
from research.training.reasoning_tasks import Solutions, VerifiedTask
from research.typing import UserError

WORDS = WordVocabulary(words=countdown.vocabulary())
SUMS = WordVocabulary(words=chain.vocabulary(0, 199))


@pytest.mark.parametrize(
  ("task", "words", "length"),
  [
    (Countdown(count=20), WORDS, 30),
    (Chain(count=20, terms=(3, 5), totals=(0, 199)), SUMS, 40),
  ],
)
def test_rows_are_problems_with_right_solutions(task, words, length):
  tokenizer = words.load()
  rows = Solutions(task=task, length=length).rows(tokenizer)
  for i in (3, 19, 3):
    row, problem = rows[i], task[i]
    real = row["positions"] >= 0
    learned = row["weights"] > 0
    prompt = row["tokens"][: int(learned.argmax()) + 1]
    assert tokenizer.decode(prompt) == problem.prompt
    answer = row["targets"][learned]
    assert answer[-1] == tokenizer.eos
    assert task.verify(problem, tokenizer.decode(answer)).correct
    np.testing.assert_array_equal(
      row["targets"][: real.sum() - 1], row["tokens"][1 : real.sum()]
    )
    assert not row["weights"][~real].any()


def test_batches_are_the_rows_shuffled():
  data = Solutions(task=Countdown(count=8), length=30, batch_size=4, seed=1)
  tokenizer = WORDS.load()
  batches = iter(data.training(tokenizer))
  seen = np.concatenate([next(batches)["tokens"] for _ in range(2)])
  rows = data.rows(tokenizer)
  every = sorted(rows[i]["tokens"].tolist() for i in range(8))
  assert sorted(seen.tolist()) == every


def test_a_problem_is_in_one_split():
  def keys(split):
    task = Countdown(count=300, split=split, numbers=3)
    return {task.key(problem) for problem in task}

  train, heldout = keys("train"), keys("heldout")
  assert train and heldout
  assert not train & heldout


def test_a_solution_has_to_fit():
  rows = Solutions(task=Countdown(count=1), length=28).rows(WORDS.load())
  with pytest.raises(UserError, match=r"Solutions.length: found 28.* 29 tok"):
    rows[0]
  with pytest.raises(UserError, match="no tokenizer"):
    Solutions(task=Countdown(count=1), length=28).rows(None)


def test_rewards_are_verdicts_on_answers_that_have_ended():
  task = Countdown(count=10, split="heldout")
  verified = VerifiedTask(task=task, vocabulary=WORDS)
  prompts = verified.sample(np.random.default_rng(0), 10)
  assert sorted(x.problem.id for x in prompts) == sorted(x.id for x in task)
  for prompt in prompts:
    encode = verified.tokenizer.encode
    assert list(prompt.tokens) == encode(prompt.problem.prompt)
    right = task.oracle(prompt.problem)
    assert verified.reward(prompt, encode(f"{right} {EOS}")) == 1
    assert verified.reward(prompt, encode(right)) == 0
    wrong = task.mutated(prompt.problem)
    assert verified.reward(prompt, encode(f"{wrong} {EOS}")) == 0
    assert verified.reward(prompt, []) == 0
  with pytest.raises(UserError, match="found 10, expected at least 11"):
    verified.sample(np.random.default_rng(0), 11)


def test_rates_count_greedy_and_sampled_answers(monkeypatch):
  """Of a policy that is right greedily, and sampled to half of the prompts."""
  verified = VerifiedTask(
    task=Countdown(count=8, split="heldout"), vocabulary=WORDS
  )

  def answers(model, params, prompts, new_tokens, stop, sampling, key):
    found = []
    for i, tokens in enumerate(prompts):
      text = verified.tokenizer.decode(tokens)
      numbers, target = countdown.parse_prompt(text)
      steps = next(verified.task.solutions(numbers, target))
      cut = i % 2 and sampling.temperature
      found.append(
        verified.tokenizer.encode(" ".join(steps) + ("" if cut else f" {EOS}"))
      )
    return found

  monkeypatch.setattr(rewarded_task, "sampled", answers)
  rates = rewarded_task.SampledReward(
    task=verified, count=8, samples=3, new_tokens=23
  )
  model = type("Loaded", (), {"model": None, "params": {}})
  assert rates(model).to_json() == {
    "greedy": 1.0,
    "sampled": 0.5,
    "count": 8,
    "samples": 3,
  }
