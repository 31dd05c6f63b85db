"""Reasoning tasks as rows and rewards, against the tasks' own verifiers."""

import dataclasses
import itertools

import numpy as np
import pytest

from research.data import packing, sources
from research.data.sources.records import completion_example
from research.reasoning.problem import Problem, Verdict
from research.reasoning.prompting import PromptWithArrays
from research.reasoning.tasks import Chain, Countdown, chain, countdown
from research.reasoning.tasks.task import Task
from research.reasoning.words import EOS, WordVocabulary
from research.text.tokenizer import Tokenizer
from research.training.alignment import rewarded_task
from research.training.reasoning_tasks import Solutions, VerifiedTask
from research.typing import UserError
from tests import support_text

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
    row = rows[i]
    real = row["positions"] >= 0
    learned = row["weights"] > 0
    prompt = tokenizer.decode(
      row["tokens"][: int(learned.argmax()) + 1].tolist()
    )
    problem = Problem(id="x", prompt=prompt, answer=task[i].answer)
    answer = row["targets"][learned]
    assert answer[-1] == tokenizer.eos
    assert task.verify(problem, tokenizer.decode(answer.tolist())).correct
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


def test_a_row_has_the_ids_of_its_whole_text():
  """Also where the tokenizer puts a blank before a text, as Llama 2's."""
  backend = support_text.byte_fallback([support_text.BLANK, "</s>"])
  support_text.put_blank_before(backend)
  backend.add_special_tokens(["</s>"])
  tokenizer = Tokenizer(backend=backend, eos=backend.token_to_id("</s>"))
  task = Chain(count=2, terms=(2, 3))
  rows = Solutions(task=task, length=200).rows(tokenizer)
  for i, problem in enumerate(task):
    whole = f"{problem.prompt}{task.oracle(problem)}</s>"
    ids = backend.encode(whole).ids
    assert rows[i]["tokens"][: len(ids)].tolist() == ids
    assert (rows[i]["positions"] >= 0).sum() == len(ids)


def test_rows_are_those_of_the_pipeline():
  """Packed one a row, and the same for any number of processes."""
  task, tokenizer = Chain(count=9, terms=(2, 5), totals=(0, 199)), SUMS.load()
  data = Solutions(task=task, length=36, batch_size=4, seed=3)
  rows = data.rows(tokenizer)
  for i, problem in enumerate(task):
    found = completion_example(tokenizer, problem.prompt, task.oracle(problem))
    packed = packing.pack(
      [found.tokens], 36, packing.one_per_row, [found.loss_mask]
    )[0]
    assert rows[i].keys() == packed.keys()
    for name, x in packed.items():
      np.testing.assert_array_equal(rows[i][name], x, name)
      assert rows[i][name].dtype == x.dtype
  whole = [x["tokens"] for x in itertools.islice(data.training(tokenizer), 5)]
  parts = [iter(data.training(tokenizer, i, 2)) for i in range(2)]
  for batch in whole:
    both = np.concatenate([next(part)["tokens"] for part in parts])
    np.testing.assert_array_equal(both, batch)
  with pytest.raises(UserError, match="multiple of the 3 processes"):
    data.training(tokenizer, 0, 3)


def test_problems_drawn_at_once_are_of_the_split_and_solved():
  task = Countdown(count=300, split="heldout", seed=5)
  found = task.solved()
  assert found.rows.shape == (300, 29)
  texts = [[found.words[i] for i in row] for row in found.rows]
  for words in texts:
    prompt = " ".join(words[: found.prompt])
    problem = Problem(id="x", prompt=prompt)
    assert task.verify(problem, " ".join(words[found.prompt :])).correct
    assert sources.split_of(task.key(problem)) == "heldout"
  # The same first ones, however many; and signs as often as one by one.
  few = Countdown(count=9, split="heldout", seed=5).solved()
  np.testing.assert_array_equal(few.rows, found.rows[:9])
  share = [sum(w.count(x) for w in texts) / 900 for x in "+-*"]
  one_by_one = [" ".join(x.meta["solution"]) for x in task]
  for sign, own in zip("+-*", share, strict=True):
    other = sum(text.count(f" {sign} ") for text in one_by_one) / 900
    assert own == pytest.approx(other, abs=0.08)  # 3.5 standard errors
  with pytest.raises(UserError, match="admit too few"):
    Countdown(count=9, values=(1, 1), targets=(90, 99)).solved()


def test_a_problem_is_in_one_split():
  def keys(split):
    task = Countdown(count=300, split=split, numbers=3)
    return {task.key(problem) for problem in task}

  train, heldout = keys("train"), keys("heldout")
  assert train and heldout
  assert not train & heldout


def test_a_solution_has_to_fit():
  with pytest.raises(UserError, match=r"Solutions.length: found 28.* 29 tok"):
    Solutions(task=Countdown(count=1), length=28).rows(WORDS.load())
  short = Solutions(task=Chain(count=1, terms=(2, 2)), length=9)
  rows = short.rows(WordVocabulary(words=chain.vocabulary(-200, 200)).load())
  with pytest.raises(UserError, match=r"found 9, and problem 'chain.* 11 tok"):
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers(Task):
  """Asks for numbers from `first` on."""

  first: int

  def problem(self, index):
    return Problem(id=f"{self.split}/{index}", prompt=str(self.first + index))

  def verify(self, problem, text):
    return Verdict(text == problem.prompt)


def test_questions_of_another_split_are_not_sampled():
  """The task asks 0 to 7, the other split 4 to 8."""
  task = Numbers(count=8, first=0)
  asked = Numbers(count=5, first=4, split="heldout")
  verified = VerifiedTask(task=task, vocabulary=SUMS, excluding=asked)
  prompts = verified.sample(np.random.default_rng(0), 4)
  assert sorted(x.problem.prompt for x in prompts) == ["0", "1", "2", "3"]
  with pytest.raises(UserError, match=r"found 4 that are not excluded.* 5"):
    verified.sample(np.random.default_rng(0), 5)


def test_an_answer_may_end_with_other_tokens():
  task = Countdown(count=1, split="heldout")
  ends = tuple(WORDS.load().encode(";"))
  verified = VerifiedTask(task=task, vocabulary=WORDS, stop=ends)
  prompt = verified.prompt(task[0])
  right = verified.tokenizer.encode(task.oracle(task[0]))
  assert right[-1] in ends and verified.reward(prompt, right) == 1
  ended = [*right, *verified.tokenizer.stop]
  assert verified.reward(prompt, ended) == 0


def test_a_reward_function_reads_the_answer_that_has_ended():
  """Of the problem and the text; what the policy reads is the prompting's."""
  asked = []

  def longer(problem, text):
    asked.append((problem, text))
    return len(text.split()) / 100

  def twice(tokenizer, question):
    return tokenizer.prompt(question) * 2

  task = Countdown(count=1)
  verified = VerifiedTask(
    task=task, vocabulary=WORDS, reward_fn=longer, prompting=twice
  )
  (prompt,) = verified.sample(np.random.default_rng(0), 1)
  tokenizer = verified.tokenizer
  assert list(prompt.tokens) == tokenizer.prompt(task[0].prompt) * 2
  words = tokenizer.encode("7 + 5")
  assert verified.reward(prompt, words) == 0 and not asked
  assert verified.reward(prompt, [*words, *tokenizer.stop]) == 0.03
  assert asked == [(task[0], "7 + 5")]


def test_prompts_with_pictures_are_refused():
  """Their tokens alone were sampled from."""

  def drawn(tokenizer, question):
    tokens = tuple(tokenizer.prompt(question))
    return PromptWithArrays(tokens, {"pixels": np.zeros((1, 2, 2, 3))})

  task = Countdown(count=1)
  verified = VerifiedTask(task=task, vocabulary=WORDS, prompting=drawn)
  with pytest.raises(UserError, match=r"prompting: .* the arrays pixels"):
    verified.sample(np.random.default_rng(0), 1)


def test_a_verifier_that_raises_gives_no_reward():
  class Raises(Countdown):
    def verify(self, problem, text):
      raise ZeroDivisionError("of no number")

  verified = VerifiedTask(task=Raises(count=1), vocabulary=WORDS)
  prompt = verified.prompt(verified.task[0])
  with pytest.warns(UserWarning, match="Raises: not judged"):
    assert verified.reward(prompt, verified.tokenizer.stop) == 0


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
