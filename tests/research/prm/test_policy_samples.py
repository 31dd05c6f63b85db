"""Labels of sampled solutions, against completers that never err.

From a perfect completer every rollout succeeds where a solution exists, so
that counts and the oracle's labels must agree.
"""

import dataclasses

import jax
import pytest

from research.generation import generate
from research.prm import policy_samples
from research.prm.labels import hard, truncate
from research.reasoning.segmentation import SEMICOLON
from research.reasoning.tasks import Chain, Countdown
from research.reasoning.tasks.countdown import parse_prompt
from research.typing import UserError
from tests import support

KEY = jax.random.key(0)


class Texts:
  """A sampler whose prompts are texts, and whose answers a function gives."""

  def __init__(self, answer):
    self.answer, self.asked = answer, []

  def prompt(self, problem, steps=()):
    return problem, tuple(steps)

  def __call__(self, prompts, key):
    self.asked.append(prompts)
    return [self.answer(i, *prompt) for i, prompt in enumerate(prompts)]


def solve(task):
  """Returns a function that solves what is left of a problem, or gives up."""

  def answer(i, problem, steps):
    del i
    left, target = parse_prompt(problem.prompt)
    for step in steps:
      try:
        left = task._read(left, step)[-1]
      except ValueError:
        return "no way"
    return " ".join(next(task.solutions(left, target), ["no way"]))

  return answer


def wander(task):
  """Returns a function that plays on at random, and sometimes never ends."""

  def answer(i, problem, steps):
    assert not steps
    if i % 5 == 4:
      return None
    left, _ = parse_prompt(problem.prompt)
    out = []
    while len(left) > 1:
      moves = list(task.moves(left))
      # Neighbours begin alike.
      step, left = moves[(7 * (i // 2) + len(out)) % len(moves)]
      out.append(step)
    if i % 7 == 3:
      out[1] = "1 + 1 = 3 ;"
    return " ".join(out)

  return answer


def test_rollouts_that_never_err_agree_with_the_oracle():
  task = Countdown(count=12)
  problems = task[:]
  found = policy_samples.sample_solutions(
    Texts(wander(task)), task, problems, 5, SEMICOLON, KEY
  )
  assert len(found) == 4 * 12  # every fifth was cut
  exact = policy_samples.with_exact_labels(found, task, problems)
  completer = Texts(solve(task))
  both = policy_samples.with_rollouts(exact, completer, task, problems, 3, KEY)
  first = {one.first_error for one in both}
  assert {0, 1} <= first
  for one in both:
    assert one.label_source == "exact_first_error"
    assert one.labels == truncate(hard(one.mc))
    assert [x.rollouts for x in one.mc] == [3, 3, 1]
    assert one.final_correct == (one.first_error == -1)
  # A prefix that several solutions share is completed once.
  (asked,) = completer.asked
  prefixes = {(one.prompt, one.steps[:n]) for one in found for n in (1, 2)}
  assert len(asked) == 3 * len(prefixes) < 3 * 2 * len(found)


def test_errors_of_chains_are_never_made_good():
  task = Chain(count=6, terms=(4, 4))
  problems = task[:]

  def sums(i, problem, steps):
    """Goes on from the last total; whole solutions err at a step, or never."""
    words = problem.prompt.split()[:-1]
    total = int(steps[-1].split()[-2]) if steps else int(words[0])
    out = []
    for n in range(len(steps), 3):
      sign, term = words[2 * n + 1], int(words[2 * n + 2])
      after = total + term if sign == "+" else total - term
      after += not steps and i % 4 == n
      out.append(f"{total} {sign} {term} = {after} ;")
      total = after
    return " ".join(out)

  found = policy_samples.sample_solutions(
    Texts(sums), task, problems, 2, SEMICOLON, KEY
  )
  found = policy_samples.with_exact_labels(found, task, problems)
  found = policy_samples.with_rollouts(
    found, Texts(sums), task, problems, 2, KEY
  )
  assert {one.first_error for one in found} == {-1, 0, 1, 2}
  for one in found:
    assert one.final_correct == (one.first_error == -1)
    assert one.labels == truncate(hard(one.mc))
  unknown = [dataclasses.replace(one, final_correct=None) for one in found]
  again = policy_samples.with_rollouts(
    unknown, Texts(sums), task, problems, 2, KEY
  )
  assert [one.mc for one in again] == [one.mc for one in found]
  with pytest.raises(UserError, match="k = 0"):
    policy_samples.with_rollouts(found, Texts(sums), task, problems, 0, KEY)


class Numbers:
  """The tokenizer of ids as words; most of them end a text."""

  stop = tuple(range(0, 60, 2))

  def decode(self, ids):
    return " ".join(map(str, ids))


def test_a_sampler_s_texts_are_generated_ones():
  """Row by row, in the order of the prompts; those without an end are None."""
  model = support.model("llama")
  params = support.params(model)
  sampler = policy_samples.PolicySampler(
    model=model,
    params=params,
    tokenizer=Numbers(),
    new_tokens=2,
    rows=4,
  )
  prompts = [[5, 6, 7], [8], [9, 10], [11], [3, 4]]
  texts = sampler(prompts, KEY)
  first = generate.generate(
    *(model, params, [[8], [11], [9, 10], [3, 4]], 2),
    *(sampler.sampling, jax.random.fold_in(KEY, 0), Numbers.stop),
  )
  for i, row in zip((1, 3, 2, 4), first.tokens, strict=True):
    # Without the token that ended it, which is the text's last word.
    assert (texts[i] is None) == (len(row) == 2)
    if texts[i] is not None:
      assert texts[i].split()[:-1] == list(map(str, row))
  assert None in texts and set(texts) != {None}
