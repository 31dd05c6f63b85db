"""GRPO of a tiny Transformer: what a round holds, and that a run resumes."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.generation.sampling import Sampling
from research.optim import optim
from research.training import loop, state
from research.training.alignment import surrogate
from research.training.alignment.advantages import centered, varied
from research.training.alignment.group_rollouts import GroupRollouts
from research.training.alignment.overlong import SoftOverlong, mask_overlong
from research.training.alignment.policy_gradient import PolicyGradient
from research.training.alignment.rewarded_task import (
  AnswerRewards,
  GreedyReward,
  Prompt,
  sampled,
)
from research.training.objectives.objective import NextToken
from research.typing import UserError
from tests import support

V, END = 5, 4
MODEL = support.model(depth=1, width=16, hidden=16, head_dim=8, vocab=V)
GOAL = PolicyGradient(model=MODEL, surrogate=surrogate.dapo())


@dataclasses.dataclass(frozen=True)
class Echo:
  """Rewards an answer that begins with the prompt's last token."""

  bad: float | None = None
  stop_tokens: tuple[int, ...] = (END,)

  def sample(self, rng, count):
    rows = rng.integers(0, END, (count, 3))
    return [
      Prompt(tuple(row[: 2 + i % 2].tolist())) for i, row in enumerate(rows)
    ]

  def reward(self, prompt, answer):
    if self.bad is not None:
      return self.bad
    return float(answer[0] == prompt.tokens[-1])


@dataclasses.dataclass(frozen=True)
class Together(Echo):
  """Judges all answers of a round at once, and counts the long ones."""

  def judge(self, prompts, answers):
    rewards = [
      self.reward(*pair) for pair in zip(prompts, answers, strict=True)
    ]
    long = float(np.mean([len(answer) > 1 for answer in answers]))
    return AnswerRewards(rewards, {"long": long})


def made(**more):
  how = dict(task=Echo(), prompts=4, group=4, prompt_tokens=3, new_tokens=3)
  how |= dict(advantages=centered)
  return GroupRollouts(**(how | more)).with_objective(GOAL)


PARAMS = support.params(MODEL)


def parsed(batch):
  """Yields each row's prompt and answer, by its segments and weights."""
  for row in range(len(batch["tokens"])):
    real = batch["segments"][row] == 0
    text = batch["tokens"][row][real].tolist()
    begin = int(np.argmax(batch["weights"][row] > 0)) + 1
    yield text[:begin], text[begin:]


def test_a_round_has_what_its_samples_say():
  how = made()
  found = how.sample_round(PARAMS, 8)
  batch = found.common
  assert batch["tokens"].shape == (16, 6)
  rewards = []
  for row, (prompt, answer) in enumerate(parsed(batch)):
    assert 1 <= len(answer) <= 3 and END not in answer[:-1]
    targets = batch["targets"][row][batch["weights"][row] > 0]
    assert targets.tolist() == answer
    rewards.append(Echo().reward(Prompt(tuple(prompt)), answer))
  groups = np.reshape(rewards, (4, 4))
  np.testing.assert_allclose(
    batch["advantage"],
    (groups - groups.mean(1, keepdims=True)).ravel(),
    atol=1e-6,
  )
  assert found.metrics["reward"] == pytest.approx(np.mean(rewards))
  assert 0 < found.metrics["reward"] < 1
  # At the first update, every ratio is 1.
  loss, weight, sums = jax.jit(GOAL)(PARAMS, batch, None)
  assert np.isfinite(loss)
  np.testing.assert_allclose(sums["ratio"] / weight, 1, rtol=1e-6)
  lengths = (batch["weights"] > 0).sum()
  assert float(weight) == lengths
  assert found.metrics["answer_tokens"] == pytest.approx(lengths / 16)


def test_one_update_learns_as_the_first_of_two():
  """What samples has log p of its own; it is asked again where it moves."""
  one, two = (made(updates=n).sample_round(PARAMS, 8).common for n in (1, 2))
  assert "old" not in one and (np.asarray(two["old"]) != 0).any()
  chex.assert_trees_all_equal(one, {x: two[x] for x in one})

  @jax.jit
  def gradient(batch):
    return jax.grad(lambda params: GOAL(params, batch, None)[0])(PARAMS)

  chex.assert_trees_all_close(gradient(one), gradient(two), atol=1e-6)
  assert max(float(abs(x).max()) for x in jax.tree.leaves(gradient(one))) > 1e-3


def test_answers_are_those_of_each_prompt_alone():
  """A prompt that is processed once, and copied, is continued as many are."""
  prompts = [(1,), (2, 3), (0, 2, 1), (1,)]
  key = jax.random.key(5)
  how, drawn = (MODEL, PARAMS), Sampling(temperature=1.0)
  once = sampled(*how, prompts, 6, (END,), drawn, key, copies=3)
  each = [prompt for prompt in prompts for _ in range(3)]
  assert once == sampled(*how, each, 6, (END,), drawn, key)
  assert len({tuple(x) for x in once}) > 4


def test_a_round_is_a_function_of_parameters_and_step():
  how = made()
  first = how.sample_round(PARAMS, 3).common
  chex.assert_trees_all_equal(how.sample_round(PARAMS, 3).common, first)
  other = how.sample_round(PARAMS, 4).common
  asked = [[prompt for prompt, _ in parsed(x)] for x in (first, other)]
  assert asked[0] != asked[1]
  # Children of one prompt differ.
  rows = {tuple(row) for row in first["tokens"].tolist()}
  assert len(rows) > 4


def test_a_task_that_judges_a_round_at_once_adds_its_metrics():
  alone = made().sample_round(PARAMS, 3)
  found = made(task=Together()).sample_round(PARAMS, 3)
  chex.assert_trees_all_equal(found.common, alone.common)
  lengths = (np.asarray(alone.common["weights"]) > 0).sum(axis=1)
  long = float(np.mean(lengths > 1))
  assert found.metrics == alone.metrics | {"long": pytest.approx(long)}
  assert 0 < long < 1


def test_groups_without_a_gradient_are_sampled_anew():
  """DAPO: with attempts, all of a batch's groups have rewards that differ."""
  how = made(select=varied, attempts=1)
  batch = how.sample_round(PARAMS, 0).common
  some = (batch["weights"].reshape(4, -1) > 0).any(1)
  assert 0 < some.sum() < 4  # those of equal rewards weigh nothing
  assert (batch["advantage"].reshape(4, 4)[~some] == 0).all()
  full = dataclasses.replace(how, attempts=8).sample_round(PARAMS, 0).common
  assert (full["weights"].reshape(4, -1) > 0).any(1).all()
  assert full["tokens"].shape == batch["tokens"].shape


def test_a_punishment_of_length_selects_no_group():
  """DAPO's equation 11 counts right answers, whatever their length."""
  plain = made(select=varied, attempts=1)
  how = dataclasses.replace(
    plain, overlong=SoftOverlong(limit=plain.new_tokens, buffer=2)
  )
  found, want = (x.sample_round(PARAMS, 0).common for x in (how, plain))
  np.testing.assert_array_equal(found["weights"], want["weights"])
  assert (found["advantage"] != want["advantage"]).any()


def test_overlong_answers_do_not_train():
  found = made(overlong=mask_overlong).sample_round(PARAMS, 1).common
  plain = made().sample_round(PARAMS, 1).common
  ended = [answer[-1] == END for _, answer in parsed(plain)]
  assert 0 < sum(ended) < 16
  np.testing.assert_array_equal((found["weights"] > 0).any(1), ended)
  np.testing.assert_array_equal(found["advantage"], plain["advantage"])


def test_a_reference_is_asked_where_the_loss_needs_it():
  goal = PolicyGradient(
    model=MODEL,
    surrogate=surrogate.grpo(beta=0.1),
    policy=lambda params: params["policy"],
  )
  other = jax.tree.map(lambda x: 1.1 * x, PARAMS)
  how = dataclasses.replace(made(), objective=goal)
  batch = how.sample_round({"policy": PARAMS, "reference": other}, 0).common
  given = {k: jnp.asarray(v) for k, v in batch.items()}
  want = jax.jit(goal.log_probs)(other, given)
  np.testing.assert_allclose(batch["reference"], want, atol=1e-5)
  policy = jax.jit(goal.log_probs)(PARAMS, given)
  assert (np.asarray(batch["reference"]) != np.asarray(policy)).any()


@pytest.mark.slow
def test_three_steps_and_three_are_six_within_a_round(tmp_path):
  tx = optim.adamw(1e-2)

  def fit(folder, steps):
    made_state = state.create(PARAMS, ".", tx)
    return loop.fit(
      GOAL,
      tx,
      made_state,
      made(updates=2),
      loop.TrainConfig(steps=steps),
      workdir=tmp_path / folder,
    )

  whole = fit("whole", 6)
  fit("parts", 3)
  parts = fit("parts", 6)
  assert parts.start == 3
  chex.assert_trees_all_equal(parts.state, whole.state)
  moved = jax.tree.map(
    lambda a, b: float(abs(a - b).max()), whole.state.trainable, PARAMS
  )
  assert max(jax.tree.leaves(moved)) > 1e-3


def test_greedy_answers_are_counted():
  @dataclasses.dataclass(frozen=True)
  class Loaded:
    model: object
    params: object

  how = GreedyReward(task=Echo(), count=12, new_tokens=3)
  found = how(Loaded(MODEL, PARAMS))
  assert found.count == 12 and 0 <= found.right <= 12
  assert found.to_json() == {"reward": found.right / 12, "count": 12}
  assert str(found).endswith("of 12 prompts")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda: made(prompt_tokens=2).sample_round(PARAMS, 0),
      "prompt_tokens: found a prompt of 3 tokens",
    ),
    (
      lambda: made(task=Echo(bad=math.nan)).sample_round(PARAMS, 0),
      r"Echo.reward: found a reward that is not finite \(nan\)",
    ),
    (
      lambda: made().with_objective(PolicyGradient(temperature=0.5)),
      "found temperature 1.0 and PolicyGradient.temperature 0.5",
    ),
    (lambda: made().with_objective(NextToken()), "the objective NextToken"),
  ],
)
def test_mistakes(change, message):
  with pytest.raises(UserError, match=message):
    change()
