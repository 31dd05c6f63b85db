"""Rewards of a reward model, against scores that are a known function."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from research.prm.scored_task import ScoredTask
from research.prm.scores.aggregate import Min, Product
from research.reasoning.tasks import Countdown
from research.reasoning.tasks.countdown import vocabulary
from research.reasoning.words import WordVocabulary
from research.training.reasoning_tasks import VerifiedTask
from research.typing import UserError


class ByEnd:
  """Scores a step by where it ends: `1 / (1 + index of its last token)`."""

  shapes: list[tuple[int, ...]]

  def __init__(self, max_positions=None):
    self.shapes, self.max_positions = [], max_positions

  def scores(self, params, tokens, ends):
    assert params["scale"] == 1
    self.shapes.append(tokens.shape)
    # Each step of countdown ends in a semicolon.
    semicolon = WordVocabulary(words=vocabulary()).load().encode(";")[0]
    rows = np.arange(len(tokens))[:, None]
    assert ((tokens[rows, ends] == semicolon) | (ends < 0)).all()
    return np.where(ends < 0, 0.0, 1.0 / (1.0 + np.maximum(ends, 0)))


class AnyEnd(ByEnd):
  """Scores steps that have no semicolon as well."""

  def scores(self, params, tokens, ends):
    return np.where(ends < 0, 0.0, 1.0 / (1.0 + np.maximum(ends, 0)))


@dataclasses.dataclass(frozen=True)
class Loaded:
  model: Any
  params: Any
  tokenizer: Any


@dataclasses.dataclass(frozen=True)
class Source:
  model: Any

  def load(self):
    words = WordVocabulary(words=vocabulary()).load()
    return Loaded(self.model, {"scale": 1}, words)


def scored(model=None, **fields):
  verified = VerifiedTask(
    task=Countdown(count=8), vocabulary=WordVocabulary(words=vocabulary())
  )
  source = Source(model or ByEnd())
  given = dict(task=verified, reward_model=source, segmenter="semicolon")
  return ScoredTask(**given | fields)


def answers_of(task, prompt):
  """Returns a right answer, one with a false last step, and two of no use."""
  words, problem = task.task.tokenizer, prompt.problem
  right = words.encode(task.task.task.oracle(problem))
  wrong = words.encode(task.task.task.mutated(problem))
  end = words.stop[0]
  return [[*right, end], [*wrong, end], right, [end]]


@pytest.mark.parametrize("aggregate, of", [(Product(), np.prod), (Min(), min)])
def test_rewards_are_aggregated_scores_and_verdicts_stand_beside(aggregate, of):
  task = scored(aggregate=aggregate)
  (prompt,) = task.sample(np.random.default_rng(0), 1)
  answers = answers_of(task, prompt)
  found = task.judge([prompt] * 4, answers)
  ends = np.array([14, 21, 27])  # 7 tokens of a prompt, steps of 8, 7 and 6
  # A model that reads no arithmetic gives both texts the same.
  whole = of(1 / (1 + ends))
  np.testing.assert_allclose(found.rewards, [whole, whole, 0, 0], rtol=1e-6)
  assert found.metrics == {"verified": 0.25}
  assert task.reward(prompt, answers[0]) == pytest.approx(whole)


def test_a_text_without_an_answer_earns_nothing_where_one_is_required():
  """Half of a first step had all of the reward: nothing else was scored."""
  task, strict = scored(AnyEnd()), scored(AnyEnd(), answer_required=True)
  (prompt,) = task.sample(np.random.default_rng(0), 1)
  right, wrong, *_ = answers_of(task, prompt)
  answers = [right, wrong, [*right[:4], right[-1]], [*right[:8], right[-1]]]
  paid = task.judge([prompt] * 4, answers).rewards
  assert min(paid) > 0 and paid[2] > paid[3] > paid[0]
  found = strict.judge([prompt] * 4, answers)
  # A whole step is an answer of countdown's, a wrong one.
  assert found.rewards == [*paid[:2], 0, paid[3]]
  assert found.metrics == {"verified": 0.25}


def test_answers_end_where_the_task_says(monkeypatch):
  """Of an answer that another token ended, the reward was 0."""
  words = WordVocabulary(words=vocabulary())
  (end,) = words.load().encode(";")
  verified = VerifiedTask(
    task=Countdown(count=8), vocabulary=words, stop=(end,)
  )
  task = scored(task=verified, answer_required=True)
  (prompt,) = task.sample(np.random.default_rng(0), 1)
  ended, _, right, _ = answers_of(task, prompt)
  texts, verify = [], Countdown.verify

  def counted(self, problem, text):
    texts.append(text)
    return verify(self, problem, text)

  monkeypatch.setattr(Countdown, "verify", counted)
  found = task.judge([prompt] * 2, [right, ended])
  assert right[-1] == end and found.rewards[0] > 0 == found.rewards[1]
  assert found.metrics == {"verified": 0.5}
  # A verdict may take a process and seconds: one for each answer.
  assert texts == [words.load().decode(right)]


def test_rounds_of_other_lengths_share_a_program():
  model = ByEnd()
  task = scored(model)
  (prompt,) = task.sample(np.random.default_rng(0), 1)
  right = answers_of(task, prompt)[0]
  for tokens in (8, 15, 21):
    task.judge([prompt], [[*right[:tokens], right[-1]]])
  assert {shape[1] for shape in model.shapes} <= {16, 32}


def test_what_cannot_score_is_refused():
  task = scored(object())
  (prompt,) = task.sample(np.random.default_rng(0), 1)
  with pytest.raises(UserError, match="found a object, expected a reward"):
    task.reward(prompt, answers_of(task, prompt)[0])


@pytest.mark.parametrize(("room", "ok"), [(28, True), (27, False)])
def test_a_solution_is_not_read_beyond_the_model_s_context(room, ok):
  task = scored(ByEnd(room))
  (prompt,) = task.sample(np.random.default_rng(0), 1)
  # 7 tokens of a prompt, steps of 8, 7 and 6.
  answer = answers_of(task, prompt)[0]
  if ok:
    assert task.reward(prompt, answer) > 0
    return
  with pytest.raises(UserError, match="a solution of 28 tokens .* at most 27"):
    task.reward(prompt, answer)
