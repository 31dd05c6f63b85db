"""Alignment with what is checked, not learned: rewards, and pairs.

A prompt names a target; an answer is some digits, right if their sum is the
target.

`Rewards`: the base has read right answers more often than chance, and others,
too. It is then rewarded for right ones alone: by diffu-GRPO (d1,
arXiv:2504.12216), by coupled-GRPO (DiffuCoder, arXiv:2506.20639), and, as a
control, by diffu-GRPO with rewards of as many rows drawn by lot.

`Preferences`: of two answers the right one is preferred. A base that is right
now and then learns from pairs alone: by VRPO (LLaDA 1.5, arXiv:2505.19223:
several times, the same masks for policy and reference), by as many times with
masks apart, and by one time with masks apart, which is DPO with each
log-likelihood replaced by an estimate of its own.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.core.stats import Mean, above, below, mean, paired
from experiments.studies import pictures
from experiments.studies.alignment import target_rollouts
from experiments.studies.alignment.target_rollouts import (
  TargetRollouts,
  by_lot,
  exact,
)
from experiments.studies.diffusion.study import (
  DiffusionStudy,
  OfSeeds,
  Tiny,
  over_seeds,
)
from experiments.studies.diffusion.tasks import Targets, learn_targets
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.data.batches import batch_of
from research.data.sources.synthetic import rng_of
from research.diffusion.alignment.estimators import Coupled, Elbo, FullMask
from research.diffusion.alignment.grpo import GRPO
from research.diffusion.alignment.preference import VRPO
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
    model, base = learn_targets(task, self.tiny, self.base_steps, int(seed))
    rollouts = TargetRollouts(
      targets=task,
      prompts=self.prompts,
      group=self.group,
      updates=self.inner,
      judge=by_lot if kind == LOT else exact,
      objective=GRPO(
        model=model,
        mask_id=task.mask_id,
        estimator=Coupled() if kind == COUPLED else FullMask(),
      ),
    )
    tx = optim.adamw(self.rate)
    now = state.create(base, ".", tx)
    points = [self._measured(model, base)]
    key = jax.random.key(int(seed))
    for _ in range(0, self.steps, self.every):
      now = scanned(rollouts, tx, self.every, now, base, key)
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
      "alike": self.targets.agreement(found),
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
    """Returns rows of answers; see `target_rollouts.answers`."""
    return target_rollouts.answers(
      self.targets, model, params, key, prompts, group, sampling
    )

  # --- what the rows say ---

  def mean_of_kind(
    self, rows: Rows, kind: str, name: str, at: int = -1
  ) -> Mean:
    """Returns a number's mean over seeds, at the end or the start (0)."""
    arms = [f"{kind}: seed {s}" for s in range(self.seeds)]
    return mean(over_seeds(rows, arms, name, at))

  def gained(self, rows: Rows, kind: str) -> Mean:
    """Returns how much reward grew."""
    before = self._ends(rows, kind, 0)
    return paired(self._ends(rows, kind), before)

  def _ends(self, rows: Rows, kind: str, at: int = -1) -> list[float]:
    arms = [f"{kind}: seed {s}" for s in range(self.seeds)]
    return over_seeds(rows, arms, "reward", at)

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each kind."""
    return [
      {
        "kind": kind,
        "reward before": self.mean_of_kind(rows, kind, "reward", 0).value,
        "reward after": self.mean_of_kind(rows, kind, "reward"),
        "greedy before": self.mean_of_kind(rows, kind, "greedy", 0).value,
        "greedy after": self.mean_of_kind(rows, kind, "greedy").value,
        "alike before": self.mean_of_kind(rows, kind, "alike", 0).value,
        "alike after": self.mean_of_kind(rows, kind, "alike").value,
      }
      for kind in KINDS
    ]

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what holds of rewards."""
    one, coupled, lot = (self.gained(rows, kind) for kind in KINDS)
    # Both start from the same base of each seed.
    apart = paired(*(self._ends(rows, kind) for kind in (COUPLED, ONE)))
    best = self.mean_of_kind(rows, ONE, "reward")
    alike = [self.mean_of_kind(rows, ONE, "alike", at) for at in (0, -1)]
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
        below(lot, 0.05),
      ),
      Verdict("coupled-GRPO does, too", f"by {coupled}", above(coupled)),
      Verdict(
        "seeing each token once in context is worth it: coupled-GRPO gains"
        " more",
        f"by {coupled} and {one}: {apart} more",
        above(apart),
      ),
      Verdict(
        "right answers stay varied: two to one prompt are the same at most"
        " twice as often as if all were as likely",
        f"{alike[0]} times as often, then {alike[1]}",
        below(alike[1], 2),
      ),
    ]

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves rewards.png: curves of rewards."""
    drawn = plots.figure(7, 4)
    axes = drawn.add_subplot()
    runs = {
      kind: [rows[f"{kind}: seed {s}"] for s in range(self.seeds)]
      for kind in KINDS
    }
    pictures.curves(axes, runs, "rounds", "reward")
    axes.set(xlabel="rounds", ylabel="share of right answers", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    plots.save(drawn, folder / "rewards.png")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def scanned(
  rollouts: TargetRollouts,
  tx: Any,
  count: int,
  now: state.TrainState,
  reference: Params,
  key: PRNGKey,
) -> state.TrainState:
  """Returns the state after `count` rounds, as one program.

  Args:
    rollouts: of the policy, with their objective.
    tx: the optimizer.
    count: of rounds.
    now: the state, whose parameters are the policy's.
    reference: parameters that the policy stays near.
    key: of the run.
  """
  update = step.make_train_step(rollouts.objective, tx)

  def one(now, _):
    common, own, _ = target_rollouts.sample(
      rollouts, now.params, reference, key, now.step
    )

    def inner(now, own):
      return update(now, common | own, key)[0], None

    return jax.lax.scan(inner, now, own)[0], None

  return jax.lax.scan(one, now, length=count)[0]


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
    model, base = learn_targets(task, self.tiny, self.base_steps, seed)
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
      right = self.mean_of(rows, "reward", kind).times(100)
      line: dict[str, Any] = {"kind": kind, "right %": right}
      if kind != BEFORE:
        line["margin's noise"] = self.mean_of(rows, "noise", kind).value
      out.append(line)
    return out

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what holds of VRPO."""
    gain, over = (
      self.less(rows, ("reward", kind), ("reward", BEST))
      for kind in (BEFORE, NAIVE)
    )
    quieter = self.less(rows, ("noise", BEST), ("noise", APART))
    said = {
      k: str(self.mean_of(rows, "noise", k)) for k in (BEST, APART, NAIVE)
    }
    return [
      Verdict(
        "VRPO makes answers right more often",
        f"{self.mean_of(rows, 'reward', BEST)} after"
        f" {self.mean_of(rows, 'reward', BEFORE)}: {gain} more",
        above(gain),
      ),
      Verdict(
        "more so than DPO by one time and masks apart, in as many steps",
        f"{over} more than {self.mean_of(rows, 'reward', NAIVE)}",
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
