"""Steps of a text, wherever tokens are cut; free verifiers of such steps."""

import dataclasses
import itertools

import numpy as np
import pytest

from experiments.searching import free_verifiers, sampling, strategies
from experiments.searching.context import Context
from experiments.searching.prompts import Chat, IdWords, Plain
from experiments.searching.rewarded_problems import RewardedProblems
from research.data import bpe
from research.reasoning import words
from research.reasoning.problem import Verdict
from research.reasoning.tasks import chain
from research.reasoning.trace import Sampler
from research.search.policy import Path, steps_of
from research.training.alignment.additions import Additions
from research.typing import UserError
from tests.experiments.searching import parity
from tests.research.search import test_search as shared

WORDS = words.word_tokenizer(chain.vocabulary(-99, 198))


def path(tokens, cuts=(), scores=(), **fields):
  """Returns a path whose steps end at some places, and at the end."""
  ends = [*cuts, len(tokens)]
  steps = [
    tuple(tokens[a:b]) for a, b in zip([0, *ends], ends, strict=False) if b > a
  ]
  return Path(0, 0, 3, tuple(steps), tuple(scores), **fields)


def test_steps_are_the_text_however_tokens_are_cut():
  """Also within characters, and next to blanks that are no steps."""
  tokenizer = bpe.Bpe(documents=["a new\n\nline é"], size=270).load()
  text = "é→✓\n\n \n\na new line\n\n𝄞 é"
  tokens = tokenizer.encode(text)
  assert len(tokens) > 20
  for cuts in itertools.combinations(range(1, len(tokens)), 2):
    one = path(tokens, cuts, (0.1, 0.2, 0.3))
    whole, steps = steps_of(one, tokenizer.decode)
    assert whole == text
    assert "".join(step.text for step in steps) == text
    assert all(step.text.strip() for step in steps)
    assert [step.start for step in steps[1:]] == [x.end for x in steps[:-1]]
    assert steps[0].start == 0 and steps[-1].end == len(tokens)
    trace = sampling.trace_of(one, steps, "p", Verdict(False), Sampler())
    assert trace.text == text and trace.n_new == len(tokens)


def test_an_end_token_is_no_step():
  tokens = WORDS.encode("1 + 2 = 3 ;")
  end = WORDS.eos
  one = path([*tokens, end], (len(tokens),), (0.7, 0.1))
  whole, [step] = steps_of(one, WORDS.decode)
  assert (step.text, step.score, step.end) == (whole, 0.1, len(tokens) + 1)
  assert steps_of(path([end], (), (0.4,)), WORDS.decode) == ("", [])


@pytest.mark.parametrize(
  ("fields", "finish", "vote"),
  [
    (dict(done=True, stopped=True), "eos", "3"),
    (dict(done=True), "length", None),
    (dict(), "cap", None),
  ],
)
def test_a_trace_says_why_it_ended(fields, finish, vote):
  one = path(WORDS.encode("1 + 2 = 3 ;"), **fields)
  _, steps = steps_of(one, WORDS.decode)
  verdict = Verdict(True, "3", "3")
  trace = sampling.trace_of(one, steps, "p", verdict, Sampler())
  assert (trace.finish, trace.vote) == (finish, vote)


# --- verifiers ----------------------------------------------------------------


def context(task):
  return Context(
    policy=shared.policy(),
    params={},
    tokenizer=WORDS,
    prompting=Plain(),
    task=task,
    judge=task,
  )


def test_exact_steps_are_the_oracles_and_err_as_set():
  task = chain.Chain(terms=(3, 3), count=40)
  problem = task[0]
  right = task.oracle(problem)
  wrong = task.mutated(problem)
  scores = {}
  for name, text in (("right", right), ("wrong", wrong)):
    tokens = WORDS.encode(text)
    middle = tokens.index(WORDS.encode(";")[0]) + 1
    both = path(tokens, (middle,), (1.0,)), path(tokens[:middle])
    load = free_verifiers.ExactSteps().load(context(task))
    verifier = load.with_problems([problem])
    new = np.zeros((2, 1), int)
    scores[name] = verifier.read(None, both, new)[1].tolist()
  assert scores == {"right": [1, 1], "wrong": [0, 1]}
  noisy = free_verifiers.ExactSteps(right=0.9, wrong=0.2).load(context(task))
  noisy = noisy.with_problems([problem])
  for text, share in ((right, 0.9), (wrong, 0.2)):
    tokens = WORDS.encode(text)
    middle = tokens.index(WORDS.encode(";")[0]) + 1
    one = path(tokens, (middle,))
    paths = [dataclasses.replace(one, root=i) for i in range(1500)]
    found = [noisy.score(one) for one in paths]
    assert abs(np.mean(found) - share) < 5 * np.sqrt(share * (1 - share) / 1500)
  again = dataclasses.replace(one, problem=1)  # as rounds of `width` prompts
  with pytest.raises(UserError, match="the prompt 1 of 1 problems"):
    noisy.read(None, [again], np.zeros((1, 1), int))
  with pytest.raises(UserError, match="Parity has no oracle"):
    free_verifiers.ExactSteps().load(context(parity.Parity()))


# --- prompts ------------------------------------------------------------------


class Characters:
  """A tokenizer of characters, whose conversations are lines."""

  def encode(self, text):
    return list(map(ord, text))

  prompt = encode

  def chat(self, messages):
    return "".join(f"{x['role']}: {x['content']}\n" for x in messages)


def spelled(ids):
  return "".join(map(chr, ids))


def test_templates_are_filled_once():
  """A solution that has a name in braces stays what it is."""
  found = strategies.filled("{a} {b} {c}", a="{b}", b="2")
  assert found == "{b} 2 {c}"
  plain = Plain("Q: {question}")(Characters(), "{question}")
  assert spelled(plain) == "Q: {question}"
  with pytest.raises(UserError, match="template: .* without {solutions}"):
    strategies.RoundsOfText(template="{question}")


def test_a_chat_has_a_system_message_if_it_is_given():
  one = Chat(template="Add: {question}")(Characters(), "1")
  assert spelled(one) == "user: Add: 1\n"
  two = Chat(system="s")(Characters(), "Add: 1")
  assert spelled(two) == "system: s\nuser: Add: 1\n"


def test_token_tasks_are_problems():
  task = RewardedProblems(rewards=Additions(), split="heldout", count=30)
  for problem in task:
    a, _, b, _ = IdWords().prompt(problem.prompt)
    assert task.verify(problem, f"{a + b} 21").correct
    assert not task.verify(problem, f"{a + b + 1} 21").correct
    assert task.verify(problem, "<eos>").canonical is None
  with pytest.raises(UserError, match="has no tokenizer"):
    IdWords().encode("what is 2 + 2?")
