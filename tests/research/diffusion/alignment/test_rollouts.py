"""Rounds of a masked diffusion policy: judged answers and their estimates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.core.from_scratch import FromScratch
from research.diffusion.alignment.grpo import GRPO
from research.diffusion.alignment.rollouts import DiffusionRollouts
from research.nn import presets
from research.training.alignment.additions import Additions
from research.training.objectives.objective import NextToken
from research.typing import UserError

TASK = Additions(numbers=3)
SIZES = presets.Sizes(
  vocab=TASK.vocab + 1,
  width=16,
  depth=1,
  heads=2,
  kv_heads=2,
  head_dim=8,
  hidden=16,
  tied=False,
)


class Sum(Additions):
  """Without an end."""

  def reward(self, prompt, answer):
    return float(list(answer) == [sum(prompt.problem)])


def test_a_round_has_judged_answers_and_estimates_by_each_update():
  loaded = FromScratch(sizes=SIZES).load()
  goal = GRPO(model=loaded.model, mask_id=TASK.vocab)
  rollouts = DiffusionRollouts(
    task=Sum(numbers=3),
    prompts=3,
    group=8,
    updates=2,
    new_tokens=1,
    reference=lambda params: params,
    seed=3,
  ).with_objective(goal)
  made = rollouts.sample_round(loaded.params, 4)
  tokens = np.asarray(made.common["tokens"])
  assert tokens.shape == (24, 5)
  answer = np.asarray(made.common["answer"])
  assert (answer == (np.arange(5) == 4)).all()
  assert (tokens[:, 1] == TASK.plus).all()
  right = (tokens[:, 4] == tokens[:, 0] + tokens[:, 2]).reshape(3, 8)
  assert 0 < right.mean() < 1
  assert made.metrics["reward"] == pytest.approx(right.mean())
  want = right - right.mean(-1, keepdims=True)
  np.testing.assert_allclose(made.common["advantage"], want.ravel(), atol=1e-6)
  seeds = np.asarray(made.own["seed"])
  assert len(np.unique(seeds)) == 48
  later = rollouts.sample_round(loaded.params, 6).own["seed"]
  assert not set(seeds.ravel()) & set(np.asarray(later).ravel())
  given = (made.common[x] for x in ("tokens", "valid", "answer"))
  old = goal.estimate(loaded.params, *given, jnp.asarray(seeds[1]))
  np.testing.assert_allclose(made.own["old"][1], old, atol=1e-5)
  np.testing.assert_array_equal(made.own["old"], made.own["reference"])
  again = rollouts.sample_round(loaded.params, 4)
  jax.tree.map(np.testing.assert_array_equal, again.common, made.common)


def test_another_objective_is_refused():
  rollouts = DiffusionRollouts(task=TASK, new_tokens=1)
  with pytest.raises(UserError, match="found the objective NextToken"):
    rollouts.with_objective(NextToken())
