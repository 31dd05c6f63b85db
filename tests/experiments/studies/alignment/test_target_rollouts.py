"""The reward study as a run of the loop: the same updates, one by one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies.alignment.target_rollouts import (
  TargetRollouts,
  by_lot,
)
from experiments.studies.diffusion import alignment
from experiments.studies.diffusion.study import Tiny
from experiments.studies.diffusion.tasks import Targets
from research.diffusion.alignment.grpo import GRPO
from research.optim import optim
from research.training import loop, state
from research.training.objectives.objective import NextToken
from research.typing import UserError

TASK = Targets(digits=2, length=3)
TINY = Tiny(width=16, depth=1, heads=2)


@pytest.fixture(scope="module")
def policy():
  model, base = TINY.load(TASK.mask_id + 1, 0)
  # The head of a fresh model is small: answers that differ.
  return model, dict(base) | {"head": 4 * base["head"]}


@pytest.mark.slow
def test_rounds_of_the_loop_are_those_of_the_study(policy, tmp_path):
  """Stopped within a round, and gone on with."""
  model, base = policy
  goal = GRPO(model=model, mask_id=TASK.mask_id)
  rollouts = TargetRollouts(
    targets=TASK,
    prompts=4,
    group=4,
    updates=2,
    seed=3,
    reference=lambda _: base,
  ).with_objective(goal)
  tx = optim.adamw(1e-2)
  for steps in (3, 4):
    found = loop.fit(
      goal,
      tx,
      state.create(base, ".", tx),
      rollouts,
      loop.TrainConfig(steps=steps, seed=3),
      workdir=tmp_path,
    )
  assert found.start == 3
  want = alignment.scanned(
    rollouts, tx, 2, state.create(base, ".", tx), base, jax.random.key(3)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    found.state.trainable,
    want.trainable,
  )
  moved = jax.tree.map(lambda a, b: abs(a - b).max(), want.trainable, base)
  assert max(map(float, jax.tree.leaves(moved))) > 5e-3
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  rewards = [json.loads(x).get("train/reward") for x in lines]
  rewards = [x for x in rewards if x is not None]
  assert len(rewards) == 4 and rewards[0] == rewards[1]
  assert 0 < rewards[0] < 1


def test_rewards_by_lot_are_as_many():
  right = jnp.array([1.0, 0, 0, 1, 0, 0, 0, 0])
  found = [by_lot(right, jax.random.key(i)) for i in range(4)]
  assert all(float(x.sum()) == 2 for x in found)
  assert any((x != right).any() for x in found)


def test_another_objective_is_refused():
  with pytest.raises(UserError, match="found the objective NextToken"):
    TargetRollouts().with_objective(NextToken())
