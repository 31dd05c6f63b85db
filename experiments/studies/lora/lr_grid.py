"""A grid of learning rates and seeds as one compiled program an arm.

Methods are compared only where each had its rate swept (Zhang et al. 2026,
arXiv:2602.04998). Rates are half-decades, 10^(k/2); the best one is chosen on
validation documents and lies inside the grid, or the grid grows; what is
reported is held out.

Every rate with every seed is the real training step (`research.training.step`),
scanned, on documents that were drawn before: sampling in the step, or a
dispatch a step, would cost more than a tiny model's arithmetic.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.core import from_scratch
from experiments.studies.documents import documents
from experiments.studies.protocol import Row
from research import tree, weights
from research.data.batches import batch_of
from research.data.pipeline import Pipeline
from research.lora import wrap
from research.lora.init_stats import CalibrationData
from research.optim import optim
from research.training import state, step
from research.training.aot import StateTransform
from research.training.objectives.objective import NextToken
from research.typing import Array, Float, Int, Params

CHUNK, GROWTH = 4, 3
"""Rates of one call, and how often an arm's grid may grow."""

EVALUATED = 256
"""Documents of an evaluation."""


def adam(schedule: optim.Schedule) -> optax.GradientTransformation:
  """Returns plain Adam."""
  return optim.adamw(schedule, clip=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
  """One way to train.

  Attributes:
    name: of the row.
    transform: of the base's weights, or None.
    init_stats: `init_stats.CalibrationData` -> the statistics of the
      transform's field of that name, or None.
    trainable, transformed: as in `experiment.Experiment`.
    optimizer: of a schedule.
    first: k of the first of four rates, which grow from there as needed.
    shape: of the rate over steps, with peak 1; None for the setup's.
    state_transforms: as in `experiment.Experiment`.
    group: what it belongs to in tables.
  """

  name: str
  transform: Callable[..., Any] | None = None
  init_stats: Callable[..., Any] | None = None
  trainable: str = wrap.TRAINABLE
  transformed: str | None = None
  optimizer: Callable[..., Any] = adam
  first: int = -7
  shape: Callable[..., Any] | None = None
  state_transforms: tuple[StateTransform, ...] = ()
  group: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """What all arms have in common: one task, learned from one base.

  Attributes:
    model: of the base.
    task: the source that is learned.
    objective: the loss; the model is put into its field `model`.
    known: the source that the base knows; None for a fresh base a seed.
    base_steps, base_rate: of the base's own training, batches of 16.
    steps, batch: of every run.
    shape: of the rate over steps, with peak 1.
    seeds: of adapters and of the order of data.
  """

  model: from_scratch.FromScratch
  task: Any
  objective: Any
  known: Any = None
  base_steps: int = 2000
  base_rate: float = 3e-3
  steps: int = 300
  batch: int = 8
  shape: Callable[..., Any] = optim.constant(1.0)
  seeds: int = 3


@dataclasses.dataclass(frozen=True)
class StudyData:
  """The data and bases of all arms.

  Attributes:
    objective: with its model.
    bases: parameters, one tree for all seeds or one for each.
    pool: documents to learn from, int32 [N, T + 1].
    evaluations: by name, documents to be measured on.
  """

  objective: Any
  bases: Sequence[Params]
  pool: Int[Array, "N S"]
  evaluations: Mapping[str, Int[Array, "M S"]]


def study_data(setup: Setup, base: Params | None) -> StudyData:
  """Returns the data and the bases.

  Args:
    study: what is studied.
    base: of `trained_base`; None where the setup has a fresh base a seed.
  """
  task = functools.partial(documents, setup.task)
  evaluations = {
    "validation": task("validation", EVALUATED),
    "heldout": task("heldout", EVALUATED),
  }
  loaded = setup.model.load()
  objective = dataclasses.replace(setup.objective, model=loaded.model)
  pool = task("train", max(setup.task.count, EVALUATED))
  if base is None:
    bases = [
      dataclasses.replace(setup.model, seed=seed).load().params
      for seed in range(setup.seeds)
    ]
    return StudyData(objective, bases, pool, evaluations)
  evaluations["known"] = documents(setup.known, "heldout", EVALUATED)
  return StudyData(objective, [base], pool, evaluations)


def base_losses(data: StudyData) -> dict[str, float]:
  """Returns the bases' mean losses on each set of documents."""
  f = jax.jit(lambda params, rows: _loss(data.objective, params, rows))
  return {
    name: float(np.mean([f(base, rows) for base in data.bases]))
    for name, rows in data.evaluations.items()
  }


def trained_base(setup: Setup) -> Params:
  """Returns a base that knows `setup.known`, by full training."""
  loaded = setup.model.load()
  rows = documents(setup.known, "train", max(setup.known.count, EVALUATED))
  shape = optim.cosine(1.0, setup.base_steps, warmup=20)
  arm = Arm(name="base", trainable=".", shape=shape)
  member = functools.partial(
    _member,
    arm,
    dataclasses.replace(setup, steps=setup.base_steps, batch=16),
    NextToken(model=loaded.model, rows=512),
  )
  run = jax.jit(lambda p, rate: member(p, rows, jax.random.key(0), rate)[0])
  return run(loaded.params, jnp.float32(setup.base_rate)).params


def _member(arm, setup, objective, params, pool, key, rate):
  """Returns a run's last state and its losses [steps]; traced."""
  shape = arm.shape or setup.shape
  tx = arm.optimizer(lambda count: rate * shape(count))
  first = state.create(params, arm.trainable, tx, transformed=arm.transformed)
  update = step.make_train_step(objective, tx)
  order = jax.random.randint(
    jax.random.fold_in(key, 1), (setup.steps, setup.batch), 0, pool.shape[0]
  )

  def one(now, rows):
    now, metrics = update(now, _batch(pool[rows]), key)
    for transform in arm.state_transforms:
      now, metrics = transform(now, metrics)
    return now, metrics["loss"]

  return jax.lax.scan(one, first, order)


def sweep(setup: Setup, arm: Arm, data: StudyData) -> Row:
  """Returns an arm's row: all rates, all seeds, and the best rate.

  Arrays are [rates, seeds]: `validation`, `heldout`, `known` (loss there, what
  was forgotten), `rank` (of the change: singular values above 1% of the
  largest, as a share of all) and `rank90` (how many have 90% of the energy);
  `curve` is [rates, seeds, steps].
  """
  trees = [
    adapted_params(setup, arm, data, seed) for seed in range(setup.seeds)
  ]
  run = _compiled(setup, arm, data, trees)
  ks, parts = [], []
  grid = range(arm.first, arm.first + CHUNK)
  for _ in range(1 + GROWTH):
    low = grid[0] < min(ks, default=grid[-1])
    rates = jnp.asarray([10 ** (k / 2) for k in grid], jnp.float32)
    found = jax.tree.map(np.asarray, run(rates))
    ks = [*grid, *ks] if low else [*ks, *grid]
    parts = [found, *parts] if low else [*parts, found]
    table = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    best = best_of(table["validation"])
    if 0 < best < len(ks) - 1:
      break
    start = ks[0] - CHUNK if best == 0 else ks[-1] + 1
    grid = range(start, start + CHUNK)
  chosen, _ = tree.partition(trees[0], arm.trainable)
  return {
    "arm": arm.name,
    "group": arm.group,
    "trained": tree.count(chosen),
    "side": min(
      min(size)
      for path, size in wrap.matrices(trees[0]).items()
      if path.startswith("layers/")
    ),
    "ks": ks,
    "best": best,
    "inside": 0 < best < len(ks) - 1,
    **{name: x.round(5).tolist() for name, x in table.items()},
  }


def one_run(
  setup: Setup, arm: Arm, data: StudyData, k: int, seed: int = 0
) -> tuple[Params, Params]:
  """Returns the parameters before and after one run at the rate 10^(k/2)."""
  begin = adapted_params(setup, arm, data, seed)
  key = jax.random.fold_in(jax.random.key(17), seed)

  @jax.jit
  def run(params, pool, rate):
    return _member(arm, setup, data.objective, params, pool, key, rate)[
      0
    ].params

  return begin, run(begin, data.pool, jnp.float32(10 ** (k / 2)))


def adapted_params(
  setup: Setup, arm: Arm, data: StudyData, seed: int
) -> Params:
  """Returns the parameters that one seed of an arm starts from, adapted."""
  base = data.bases[seed % len(data.bases)]
  transform = arm.transform
  if transform is None:
    return base
  if arm.init_stats is not None:
    pipeline = Pipeline(
      source=setup.task, length=data.pool.shape[1] - 1, batch_size=32
    )
    calibration = CalibrationData(data=pipeline, objective=data.objective)
    stats = arm.init_stats(calibration)
    transform = dataclasses.replace(transform, init_stats=stats)
  return transform(base, jax.random.key(seed))


def best_of(losses: Float[np.ndarray, "R S"]) -> int:
  """Returns the row of the least mean; what is not finite is worst."""
  mean = losses.mean(1)
  return int(np.argmin(np.where(np.isfinite(mean), mean, np.inf)))


def _compiled(setup: Setup, arm: Arm, data: StudyData, trees: Sequence[Params]):
  """Returns f(rates) -> table, compiled once."""
  # Where one base serves all seeds, it is held once.
  apart = r"(^|/)(trained|fixed)/" if len(data.bases) == 1 else "."
  cut = [tree.partition(t, apart) for t in trees]
  own = jax.tree.map(lambda *x: jnp.stack(x), *[mine for mine, _ in cut])
  shared = cut[0][1]

  @jax.jit
  def run(own, shared, pool, evaluations, rates):
    def member(seed, rate):
      mine = jax.tree.map(lambda x: x[seed], own)
      params = tree.combine(mine, shared)
      key = jax.random.fold_in(jax.random.key(17), seed)
      last, curve = _member(arm, setup, data.objective, params, pool, key, rate)
      out = {
        name: _loss(data.objective, last.params, rows)
        for name, rows in evaluations.items()
      }
      rank, rank90 = _ranks(last.params, params)
      return out | {"rank": rank, "rank90": rank90, "curve": curve}

    seeds = jnp.arange(len(trees))
    # One after the other: as fast as side by side on a CPU, in less memory.
    return jax.lax.map(
      lambda rate: jax.lax.map(lambda seed: member(seed, rate), seeds), rates
    )

  return lambda rates: run(own, shared, data.pool, data.evaluations, rates)


def _loss(objective: Any, params: Params, rows: Int[Array, "M S"]) -> Array:
  total, weight, _ = objective(params, _batch(rows), None)
  return total / weight


def _batch(rows: Int[Array, "B S"]) -> dict[str, Array]:
  """Returns documents as a batch whose every position has a target."""
  return batch_of(rows[:, 1:], begin=rows[:, 0])


def _ranks(end: Params, begin: Params) -> tuple[Array, Array]:
  """Returns numerical rank, and rank of 90% energy, of the layers' change."""
  shares, counts = [], []
  ends, begins = (
    dict(wrap.leaves({name: params[name] for name in tree.runs(params)}))
    for params in (end, begin)
  )
  for path, w in ends.items():
    if len(w.shape) != 3:
      continue
    change = weights.dense(w) - weights.dense(begins[path])
    s = jnp.linalg.svd(change, compute_uv=False)
    shares.append(jnp.mean(s > 0.01 * s[:, :1]))
    energy = jnp.cumsum(s**2, -1) / jnp.sum(s**2, -1, keepdims=True)
    counts.append(jnp.mean(1.0 + jnp.sum(energy < 0.9, -1)))
  return jnp.mean(jnp.stack(shares)), jnp.mean(jnp.stack(counts))
