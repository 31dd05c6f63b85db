"""The runs of a study's arms: one compiled program an arm, over arrays.

Every rate with every seed is the real training step (`research.training.step`),
scanned, on documents that were drawn before: sampling in the step, or a
dispatch a step, would cost more than a tiny model's arithmetic.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies.study import Arm, Row, Study
from research import tree, weights
from research.data.batches import batch_of
from research.data.pipeline import Pipeline
from research.lora import wrap
from research.lora.init_stats import CalibrationData
from research.optim import optim
from research.training import state, step
from research.training.objectives.objective import NextToken
from research.typing import Array, Float, Int, Params

CHUNK, GROWTH = 4, 3
"""Rates of one call, and how often an arm's grid may grow."""

EVALUATED = 256
"""Documents of an evaluation."""


@dataclasses.dataclass(frozen=True)
class Ground:
  """What all arms of a study stand on.

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


def documents(source: Any, split: str, count: int) -> Int[Array, "N S"]:
  """Returns so many documents of a source, equally long."""
  made = dataclasses.replace(source, split=split, count=count)
  return jnp.asarray(np.stack([e.tokens for e in made.examples(None)]))


def ground(study: Study, base: Params | None) -> Ground:
  """Returns the data and the bases.

  Args:
    study: what is studied.
    base: what `learned` returned; None where the study has a fresh base a seed.
  """
  task = functools.partial(documents, study.task)
  evaluations = {
    "validation": task("validation", EVALUATED),
    "heldout": task("heldout", EVALUATED),
  }
  loaded = study.model.load()
  objective = dataclasses.replace(study.objective, model=loaded.model)
  pool = task("train", max(study.task.count, EVALUATED))
  if base is None:
    bases = [
      dataclasses.replace(study.model, seed=seed).load().params
      for seed in range(study.seeds)
    ]
    return Ground(objective, bases, pool, evaluations)
  evaluations["known"] = documents(study.known, "heldout", EVALUATED)
  return Ground(objective, [base], pool, evaluations)


def before(on: Ground) -> dict[str, float]:
  """Returns the bases' mean losses on each set of documents."""
  f = jax.jit(lambda params, rows: _loss(on.objective, params, rows))
  return {
    name: float(np.mean([f(base, rows) for base in on.bases]))
    for name, rows in on.evaluations.items()
  }


def learned(study: Study) -> Params:
  """Returns a base that knows `study.known`, by full training."""
  loaded = study.model.load()
  rows = documents(study.known, "train", max(study.known.count, EVALUATED))
  shape = optim.cosine(1.0, study.base_steps, warmup=20)
  arm = Arm(name="base", trainable=".", shape=shape)
  member = functools.partial(
    _member,
    arm,
    dataclasses.replace(study, steps=study.base_steps, batch=16),
    NextToken(model=loaded.model, rows=512),
  )
  run = jax.jit(lambda p, rate: member(p, rows, jax.random.key(0), rate)[0])
  return run(loaded.params, jnp.float32(study.base_rate)).params


def _member(arm, study, objective, params, pool, key, rate):
  """Returns a run's last state and its losses [steps]; traced."""
  shape = arm.shape or study.shape
  tx = arm.optimizer(lambda count: rate * shape(count))
  first = state.create(params, arm.trainable, tx, held=arm.held)
  update = step.make_train_step(objective, tx)
  order = jax.random.randint(
    jax.random.fold_in(key, 1), (study.steps, study.batch), 0, pool.shape[0]
  )

  def one(now, rows):
    now, metrics = update(now, _batch(pool[rows]), key)
    for rewrite in arm.rewrites:
      now, metrics = rewrite(now, metrics)
    return now, metrics["loss"]

  return jax.lax.scan(one, first, order)


def sweep(study: Study, arm: Arm, on: Ground) -> Row:
  """Returns an arm's row: all rates, all seeds, and the best rate.

  Arrays are [rates, seeds]: `validation`, `heldout`, `known` (loss there, what
  was forgotten), `rank` (of the change: singular values above 1% of the
  largest, as a share of all) and `rank90` (how many have 90% of the energy);
  `curve` is [rates, seeds, steps].
  """
  trees = [begun(study, arm, on, seed) for seed in range(study.seeds)]
  run = _population(study, arm, on, trees)
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
  study: Study, arm: Arm, on: Ground, k: int, seed: int = 0
) -> tuple[Params, Params]:
  """Returns the parameters before and after one run at the rate 10^(k/2)."""
  begin = begun(study, arm, on, seed)
  key = jax.random.fold_in(jax.random.key(17), seed)

  @jax.jit
  def run(params, pool, rate):
    return _member(arm, study, on.objective, params, pool, key, rate)[0].params

  return begin, run(begin, on.pool, jnp.float32(10 ** (k / 2)))


def begun(study: Study, arm: Arm, on: Ground, seed: int) -> Params:
  """Returns the parameters that one seed of an arm starts from, adapted."""
  base = on.bases[seed % len(on.bases)]
  transform = arm.transform
  if transform is None:
    return base
  if arm.look is not None:
    data = Pipeline(
      source=study.task, length=on.pool.shape[1] - 1, batch_size=32
    )
    reading = CalibrationData(data=data, objective=on.objective)
    transform = dataclasses.replace(transform, init_stats=arm.look(reading))
  return transform(base, jax.random.key(seed))


def best_of(losses: Float[np.ndarray, "R S"]) -> int:
  """Returns the row of the least mean; what is not finite is worst."""
  mean = losses.mean(1)
  return int(np.argmin(np.where(np.isfinite(mean), mean, np.inf)))


def _population(study: Study, arm: Arm, on: Ground, trees: Sequence[Params]):
  """Returns f(rates) -> table, compiled once."""
  # Where one base serves all seeds, it is held once.
  apart = r"(^|/)(trained|fixed)/" if len(on.bases) == 1 else "."
  cut = [tree.partition(t, apart) for t in trees]
  own = jax.tree.map(lambda *x: jnp.stack(x), *[mine for mine, _ in cut])
  shared = cut[0][1]

  @jax.jit
  def run(own, shared, pool, evaluations, rates):
    def member(seed, rate):
      mine = jax.tree.map(lambda x: x[seed], own)
      params = tree.combine(mine, shared)
      key = jax.random.fold_in(jax.random.key(17), seed)
      last, curve = _member(arm, study, on.objective, params, pool, key, rate)
      out = {
        name: _loss(on.objective, last.params, rows)
        for name, rows in evaluations.items()
      }
      rank, rank90 = _ranks(last.params, params)
      return out | {"rank": rank, "rank90": rank90, "curve": curve}

    seeds = jnp.arange(len(trees))
    # One after the other: as fast as side by side on a CPU, in less memory.
    return jax.lax.map(
      lambda rate: jax.lax.map(lambda seed: member(seed, rate), seeds), rates
    )

  return lambda rates: run(own, shared, on.pool, on.evaluations, rates)


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
