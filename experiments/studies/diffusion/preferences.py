"""VRPO against DPO by naive estimates, of pairs whose right answer is known.

A prompt names a target; of two answers the one whose digits have that sum is
preferred. A base that is right now and then learns from pairs alone: by VRPO
(LLaDA 1.5, arXiv:2505.19223: several times, the same masks for policy and
reference), by as many times with masks apart, and by one time with masks apart,
which is DPO with each log-likelihood replaced by an estimate of its own.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.core.stats import above
from experiments.studies import pictures
from experiments.studies.diffusion.rewards import Rewards
from experiments.studies.diffusion.study import (
  OfSeeds,
  Tiny,
)
from experiments.studies.diffusion.tasks import Targets, learn
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.data.batches import batch_of
from research.data.sources.synthetic import rng_of
from research.diffusion.alignment.estimators import Elbo
from research.diffusion.alignment.preference import VRPO
from research.training.reports import plots
from research.typing import Array, Float, Params

BEST, APART, NAIVE = "VRPO", "masks apart", "one time, masks apart"
BEFORE = "base"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preferences(OfSeeds):
  """A base, and what pairs make of it.

  Attributes:
    targets: the task.
    tiny: the model; its rate is the base's.
    base_steps: of the base's training.
    steps: of learning from pairs.
    rate: of those.
    beta: see `VRPO`.
    times: of VRPO's estimates.
    pairs: that are learned from.
    rows: answers of a measurement.
    draws: of masks, by which the noise of a margin is measured.
    seeds: of all.
  """

  targets: Targets = Targets()
  tiny: Tiny = Tiny()
  base_steps: int = 500
  steps: int = 300
  rate: float = 1e-3
  beta: float = 0.2
  times: int = 4
  pairs: int = 4096
  rows: int = 1024
  draws: int = 16

  @property
  def kinds(self) -> dict[str, dict[str, Any]]:
    """Ways to learn -> what is set of `VRPO`."""
    many, one = Elbo(times=self.times), Elbo(times=1)
    return {
      BEST: dict(estimator=many),
      APART: dict(estimator=many, shared=False),
      NAIVE: dict(estimator=one, shared=False),
    }

  def run(self, arm: str, before: Rows, shared: Any) -> Row:
    """Returns rewards before and after, and how noisy margins are."""
    del before, shared
    task, seed = self.targets, self.seed(arm)
    pool = batch_of(task.rows(8192), np.arange(task.length + 1) > 0)
    model, base = learn(
      pool, task.mask_id + 1, self.tiny, self.base_steps, seed, "learned"
    )
    pairs = self.paired("train", self.pairs)
    goals = {
      kind: VRPO(
        model=model,
        mask_id=task.mask_id,
        beta=self.beta,
        # What is not a parameter is no part of what learns.
        reference=lambda _: base,
        **more,
      )
      for kind, more in self.kinds.items()
    }
    made, rewards = base, {BEFORE: self._reward(model, base)}
    for kind, goal in reversed(goals.items()):
      made = self.tiny.trained(goal, base, pairs, self.steps, seed, self.rate)
      rewards[kind] = self._reward(model, made)
    # Of one policy, VRPO's, which came last.
    noise = {kind: self._noise(goal, made) for kind, goal in goals.items()}
    return {"reward": rewards, "noise": noise}

  def paired(self, split: Any, count: int) -> dict[str, Array]:
    """Returns pairs, right answers first, as a batch."""
    task, rng = self.targets, rng_of(self.targets.seed + 1, split)
    shape = (count, task.length)
    right = rng.integers(0, task.digits, shape)
    target = right.sum(1)
    wrong = rng.integers(0, task.digits, shape)
    while (same := wrong.sum(1) == target).any():
      wrong[same] = rng.integers(0, task.digits, (same.sum(), task.length))
    prompt = task.digits + target[:, None]
    rows = [np.concatenate([prompt, x], axis=1) for x in (right, wrong)]
    both = batch_of(
      np.stack(rows, axis=1).reshape(2 * count, -1),
      np.arange(task.length + 1) > 0,
    )
    return {k: v.reshape(count, 2, *v.shape[1:]) for k, v in both.items()}

  def _reward(self, model: Any, params: Params) -> float:
    rewards = Rewards(targets=self.targets, tiny=self.tiny)
    found = rewards.answers(model, params, jax.random.key(99), self.rows, 1)
    return float(self.targets.right(np.asarray(found)).mean())

  def _noise(self, goal: VRPO, params: Params) -> float:
    """Returns the standard deviation of a pair's margin over draws of masks."""
    pairs = self.paired("heldout", 64)

    @jax.jit
    def margins(keys) -> Float[Array, "N P"]:
      def one(key, pair):
        batch = {k: v[None] for k, v in pair.items()}
        return goal(params, batch, key)[2]["margin"]

      each = jax.vmap(one, in_axes=(None, 0))
      return jax.lax.map(lambda k: each(k, pairs), keys)

    found = margins(jax.random.split(jax.random.key(5), self.draws))
    return float(jnp.sqrt(found.var(0, ddof=1).mean()))

  # --- what the rows say ---

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each way to learn."""
    out: list[dict[str, Any]] = []
    for kind in (BEFORE, *self.kinds):
      right = self.of(rows, "reward", kind).times(100)
      line: dict[str, Any] = {"kind": kind, "right %": right}
      if kind != BEFORE:
        line["margin's noise"] = self.of(rows, "noise", kind).value
      out.append(line)
    return out

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what holds of VRPO."""
    gain, over = (
      self.less(rows, ("reward", kind), ("reward", BEST))
      for kind in (BEFORE, NAIVE)
    )
    quieter = self.less(rows, ("noise", BEST), ("noise", APART))
    said = {k: str(self.of(rows, "noise", k)) for k in (BEST, APART, NAIVE)}
    return [
      Verdict(
        "VRPO makes answers right more often",
        f"{self.of(rows, 'reward', BEST)} after"
        f" {self.of(rows, 'reward', BEFORE)}: {gain} more",
        above(gain),
      ),
      Verdict(
        "more so than DPO by one time and masks apart, in as many steps",
        f"{over} more than {self.of(rows, 'reward', NAIVE)}",
        above(over),
      ),
      Verdict(
        "shared masks take noise out of a pair's margin",
        ", ".join(f"{kind}: {x}" for kind, x in said.items()),
        above(quieter),
      ),
    ]

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves preferences.png: right answers by way to learn."""
    drawn = plots.figure(7, 2.8)
    axes = drawn.add_subplot()
    right = {str(line["kind"]): line["right %"] for line in self.table(rows)}
    pictures.bars(axes, right, "right answers, %")
    axes.set(title=title)
    plots.save(drawn, folder / "preferences.png")
