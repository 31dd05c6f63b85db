"""Does diffu-GRPO improve a reward that is checked, not learned?

A prompt names a target; an answer is some digits, right if their sum is the
target. The base has read right answers more often than chance, and
others, too. It is then rewarded for right ones alone: by diffu-GRPO (d1,
arXiv:2504.12216), by coupled-GRPO (DiffuCoder, arXiv:2506.20639), and, as a
control, by diffu-GRPO with rewards of as many rows drawn by lot.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.core.stats import Mean, above, mean, paired
from experiments.studies import pictures
from experiments.studies.diffusion.study import (
  DiffusionStudy,
  Tiny,
  over_seeds,
)
from experiments.studies.diffusion.tasks import Targets, learn
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.data.batches import batch_of
from research.diffusion.alignment import grpo
from research.diffusion.alignment.estimators import Coupled, FullMask
from research.diffusion.sampling import sampler
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.denoiser import NoCache
from research.generation.sampling import GREEDY, Sampling
from research.optim import optim
from research.training import state, step
from research.training.reports import plots
from research.typing import Array, Float, Int, Params, PRNGKey

ONE, COUPLED, LOT = "diffu-GRPO", "coupled-GRPO", "diffu-GRPO, rewards by lot"
KINDS = (ONE, COUPLED, LOT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewards(DiffusionStudy):
  """A base, and what becomes of it.

  Attributes:
    targets: the task.
    tiny: the model.
    base_steps: of the base's training.
    steps: rounds of answers and rewards.
    prompts, group: of a round, and answers to each.
    inner: updates a round, each with masks of its own.
    rate: of Adam, in rounds.
    every: rounds between measurements.
    rows: of a measurement.
    seeds: of all.
  """

  targets: Targets = Targets()
  tiny: Tiny = Tiny()
  base_steps: int = 1000
  steps: int = 150
  prompts: int = 8
  group: int = 8
  inner: int = 4
  rate: float = 1e-3
  every: int = 25
  rows: int = 512
  seeds: int = 3

  @property
  def arms(self) -> list[str]:
    """One for each kind of reward and seed."""
    return [f"{kind}: seed {s}" for s in range(self.seeds) for kind in KINDS]

  def run(self, arm: str, before: Rows, shared: Any) -> Row:
    """Returns curves of rewards, from the base on."""
    del before, shared
    kind, seed = arm.split(": seed ")
    task = self.targets
    pool = batch_of(task.rows(8192), np.arange(task.length + 1) > 0)
    model, base = learn(
      pool,
      task.mask_id + 1,
      self.tiny,
      self.base_steps,
      int(seed),
      "learned",
    )
    objective = grpo.GRPO(
      model=model,
      mask_id=task.mask_id,
      estimator=Coupled() if kind == COUPLED else FullMask(),
    )
    tx = optim.adamw(self.rate)
    now = state.create(base, ".", tx)
    points = [self._measured(model, base)]
    key = jax.random.key(int(seed))
    for _ in range(0, self.steps, self.every):
      now = _rounds(self, objective, tx, kind == LOT, now, base, key)
      points.append(self._measured(model, now.params))
    curves = {name: [point[name] for point in points] for name in points[0]}
    rounds = [i * self.every for i in range(len(points))]
    return {"kind": kind, "rounds": rounds, **curves}

  def _measured(self, model: Any, params: Params) -> dict[str, float]:
    """Returns rewards at temperature 1 and greedily, and how alike they are."""
    key = jax.random.key(99)
    found = np.asarray(self.answers(model, params, key, self.rows, 1))
    best = self.answers(model, params, key, self.rows, 1, GREEDY)
    right = self.targets.right(found)
    return {
      "reward": float(right.mean()),
      "greedy": float(self.targets.right(np.asarray(best)).mean()),
      "alike": self.targets.alike(found),
    }

  def answers(
    self,
    model: Any,
    params: Params,
    key: PRNGKey,
    prompts: int,
    group: int,
    sampling: Sampling | None = None,
  ) -> Int[Array, "N T"]:
    """Returns rows of answers, places by chance, by default at temperature 1.

    Args:
      model: the network.
      params: its parameters.
      key: of prompts and answers.
      prompts: how many.
      group: answers to each, next to each other.
      sampling: of tokens.
    """
    task, length = self.targets, self.targets.length
    first, second = jax.random.split(key)
    chosen = jax.random.randint(first, (prompts,), 0, task.sums)
    chosen = jnp.repeat(chosen, group)[:, None] + task.digits
    tokens = jnp.pad(
      chosen, ((0, 0), (0, length)), constant_values=task.mask_id
    )
    masked = tokens == task.mask_id
    options = SamplerConfig(
      mask_id=task.mask_id, length=length, block=length, select="random"
    )
    start = sampler.begin(tokens, masked, jnp.ones(tokens.shape, bool), second)
    end, *_ = sampler.fill_block(
      NoCache(model=model),
      params,
      start,
      jnp.int32(1),
      options,
      Sampling(temperature=1.0) if sampling is None else sampling,
    )
    return end.tokens

  # --- what the rows say ---

  def of(self, rows: Rows, kind: str, name: str, at: int = -1) -> Mean:
    """Returns a number's mean over seeds, at the end or the start (0)."""
    arms = [f"{kind}: seed {s}" for s in range(self.seeds)]
    return mean(over_seeds(rows, arms, name, at))

  def gained(self, rows: Rows, kind: str) -> Mean:
    """Returns how much reward grew."""
    arms = [f"{kind}: seed {s}" for s in range(self.seeds)]
    ends = over_seeds(rows, arms, "reward", -1)
    return paired(ends, over_seeds(rows, arms, "reward", 0))

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each kind."""
    return [
      {
        "kind": kind,
        "reward before": self.of(rows, kind, "reward", 0).value,
        "reward after": self.of(rows, kind, "reward"),
        "greedy before": self.of(rows, kind, "greedy", 0).value,
        "greedy after": self.of(rows, kind, "greedy").value,
        "alike before": self.of(rows, kind, "alike", 0).value,
        "alike after": self.of(rows, kind, "alike").value,
      }
      for kind in KINDS
    ]

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what holds of rewards."""
    one, coupled, lot = (self.gained(rows, kind) for kind in KINDS)
    best = self.of(rows, ONE, "reward")
    alike = [self.of(rows, ONE, "alike", at) for at in (0, -1)]
    return [
      Verdict(
        "diffu-GRPO improves a checked reward",
        f"by {one}, to {best}",
        above(one),
      ),
      Verdict(
        "it is the reward that does it: drawn by lot, it improves nothing"
        " (0.05)",
        f"by {lot}",
        lot.value < 0.05,
      ),
      Verdict("coupled-GRPO does, too", f"by {coupled}", above(coupled)),
      Verdict(
        "seeing each token once in context is worth it: coupled-GRPO gains"
        " more",
        f"by {coupled} and {one}",
        coupled.value - coupled.half > one.value + one.half,
      ),
      Verdict(
        "right answers stay varied: two to one prompt are the same at most"
        " twice as often as if all were as likely",
        f"{alike[0]} times as often, then {alike[1]}",
        alike[1].value < 2,
      ),
    ]

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves rewards.png: curves of rewards."""
    drawn = plots.figure(7, 4)
    axes = drawn.add_subplot()
    for i, kind in enumerate(KINDS):
      mine = [rows[f"{kind}: seed {s}"] for s in range(self.seeds)]
      curves = np.array([row["reward"] for row in mine], float)
      pictures.spread(axes, mine[0]["rounds"], curves, kind, plots.style(i))
    axes.set(xlabel="rounds", ylabel="share of right answers", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    plots.save(drawn, folder / "rewards.png")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _rounds(study, objective, tx, by_lot, now, reference, key):
  """Returns the state after `study.every` rounds."""
  update = step.make_train_step(objective, tx)

  def one(now, _):
    at = jax.random.fold_in(key, now.step)
    rows = study.answers(
      objective.model, now.params, at, study.prompts, study.group
    )
    rewards = study.targets.right(rows).astype(jnp.float32)
    if by_lot:
      rewards = jax.random.permutation(jax.random.fold_in(at, 1), rewards)
    batch = _batch(study, rows, rewards)

    old = now.params

    def inner(now, i):
      seed = now.step * rows.shape[0] + jnp.arange(rows.shape[0])
      batched = (batch["tokens"], batch["valid"], batch["answer"], seed)
      more = {
        "seed": seed,
        "old": objective.estimate(old, *batched),
        "reference": objective.estimate(reference, *batched),
      }
      return update(now, batch | more, key)[0], None

    return jax.lax.scan(inner, now, jnp.arange(study.inner))[0], None

  return jax.lax.scan(one, now, length=study.every)[0]


def _batch(study, rows, rewards: Float[Array, " N"]) -> dict[str, Array]:
  groups = rewards.reshape(study.prompts, study.group)
  place = jnp.arange(rows.shape[1])
  return {
    "tokens": rows,
    "valid": jnp.ones(rows.shape, bool),
    "answer": jnp.broadcast_to(place > 0, rows.shape),
    "advantage": grpo.advantages(groups).reshape(-1),
  }
