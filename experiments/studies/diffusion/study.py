"""What the studies of masked diffusion share: arms, tiny models, training.

A study says which arms it has and how to run one; an arm's row is plain JSON,
stored once. Models are trained by the real step
(`research.training.step`), scanned, at a constant rate; what is judged is the
moving average of the weights, so that every point of a curve is worth the
same, whatever comes after it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.core.from_scratch import FromScratch
from experiments.core.stats import Mean, mean, paired
from experiments.studies.protocol import Row, Rows, Study, describe
from research.nn import presets
from research.nn.transformer import Transformer
from research.optim import optim
from research.training import state, step
from research.training.objectives.objective import Batch, Objective
from research.typing import Params, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny:
  """A small Transformer, and how it is trained.

  Attributes:
    width, depth, heads: of the model; the feed-forward is twice as wide.
    batch: rows of a step.
    rate: of Adam, constant after `warmup` steps.
    warmup: see `rate`.
    average: decay of the moving average of weights.
    every: steps of a compiled piece of training.
  """

  width: int = 64
  depth: int = 2
  heads: int = 4
  batch: int = 32
  rate: float = 3e-3
  warmup: int = 50
  average: float = 0.99
  every: int = 250

  def load(self, vocab: int, seed: int) -> tuple[Transformer, Params]:
    """Returns the model and random weights, for `vocab` ids in all."""
    sizes = presets.Sizes(
      vocab=vocab,
      width=self.width,
      depth=self.depth,
      heads=self.heads,
      kv_heads=self.heads,
      head_dim=self.width // self.heads,
      hidden=2 * self.width,
      tied=False,
    )
    loaded = FromScratch(sizes=sizes, seed=seed).load()
    return loaded.model, loaded.params

  def train(
    self,
    objective: Objective,
    params: Params,
    pool: Batch,
    steps: int,
    seed: int,
    rate: float | None = None,
  ) -> Iterator[tuple[int, Params]]:
    """Yields steps done and averaged weights, after each `every` steps.

    Args:
      objective: with its model.
      params: at the start.
      pool: rows to draw batches from, a batch of all of them.
      steps: in all.
      seed: of the order and of the masks.
      rate: instead of `self.rate`.
    """
    piece = _piece(objective, self)
    rate = jnp.float32(self.rate if rate is None else rate)
    now = _begin(self, params)
    key, done = jax.random.key(seed), 0
    while done < steps:
      count = min(self.every, steps - done)
      now = piece(now, pool, key, rate, count)
      done += count
      yield done, now.ema

  def trained(self, *args: Any, **kwargs: Any) -> Params:
    """Returns the averaged weights that `train` ends with."""
    *_, (_, params) = self.train(*args, **kwargs)
    return params


def _optimizer(tiny: Tiny, rate: Any) -> Any:
  # Rates are data: runs at several of them share one compilation.
  shape = optim.constant(1.0, tiny.warmup)
  return optim.adamw(lambda count: rate * shape(count))


def _begin(tiny: Tiny, params: Params) -> state.TrainState:
  return state.create(params, ".", _optimizer(tiny, 1.0), average=True)


@functools.lru_cache(maxsize=8)
def _piece(objective: Objective, tiny: Tiny) -> Callable[..., Any]:
  """Returns `count` steps as one program."""

  @functools.partial(jax.jit, static_argnums=4, donate_argnums=0)
  def piece(now, pool, key, rate, count):
    tx = _optimizer(tiny, rate)
    update = step.make_train_step(objective, tx, average=tiny.average)
    total = pool["tokens"].shape[0]

    def one(now, _):
      at = jax.random.fold_in(jax.random.fold_in(key, 1), now.step)
      chosen = jax.random.randint(at, (tiny.batch,), 0, total)
      batch = {name: x[chosen] for name, x in pool.items()}
      return update(now, batch, key)[0], None

    return jax.lax.scan(one, now, length=count)[0]

  return piece


def over_seeds(rows: Rows, arms: Sequence[str], *path: Any) -> list[float]:
  """Returns one number of each arm, found along `path` in its row."""
  out = []
  for arm in arms:
    found: Any = rows[arm]
    for name in path:
      found = found[name]
    out.append(float(found))
  return out


class DiffusionStudy(Study):
  """A study whose table needs all of its arms."""

  needs_all = True

  def settings(self, arm: str) -> str:
    """Returns all fields; the number of seeds only where it counts.

    More seeds leave what is there as it is, but for rates, which are tried with
    the seed after the last.
    """
    swept = arm.startswith("rates of ")
    return describe(self) if swept else describe(self, "seeds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfSeeds(DiffusionStudy):
  """A study whose arms are seeds, each a row of all that is compared.

  Attributes:
    seeds: how many.
  """

  seeds: int = 3

  @property
  def arms(self) -> list[str]:
    """One for each seed."""
    return [f"seed {s}" for s in range(self.seeds)]

  def seed(self, arm: str) -> int:
    """Returns the seed of an arm."""
    return int(arm.removeprefix("seed "))

  def mean_of(self, rows: Rows, *path: Any) -> Mean:
    """Returns a number's mean over seeds, found along `path`."""
    return mean(over_seeds(rows, self.arms, *path))

  def less(self, rows: Rows, a: Sequence[Any], b: Sequence[Any]) -> Mean:
    """Returns how much less the number along `a` is than that along `b`."""
    return paired(*(over_seeds(rows, self.arms, *path) for path in (b, a)))


def swept(kinds: Iterable[str], seeds: int) -> list[str]:
  """Returns arms of kinds whose rates are swept: those, then all by seed."""
  kinds = list(kinds)
  rates = [f"rates of {kind}" for kind in kinds]
  return rates + [f"{kind}, seed {s}" for kind in kinds for s in range(seeds)]


def swept_before(
  arm: str, rows: Rows, alike: Mapping[str, str] | None = None
) -> tuple[str, int, float]:
  """Returns an arm's kind, seed and the best rate that was found for it.

  Args:
    arm: of a kind and a seed.
    rows: of the arms before it.
    alike: kinds that keep the rate of another one.

  Raises:
    UserError: the rates have not been swept.
  """
  kind, seed = arm.split(", seed ")
  swept = f"rates of {(alike or {}).get(kind, kind)}"
  if swept not in rows:
    raise UserError(f"{arm}: needs the arm '{swept}'; run it first")
  return kind, int(seed), rows[swept]["rate"]


def best_rate(kind: str, found: Mapping[float, float]) -> float:
  """Returns the rate whose loss is lowest.

  Raises:
    UserError: none is finite.
  """
  good = {rate: loss for rate, loss in found.items() if math.isfinite(loss)}
  if not good:
    raise UserError(f"rates of {kind}: none of {tuple(found)} was stable")
  return min(good, key=good.__getitem__)


def marks(steps: int, every: int, points: int) -> set[int]:
  """Returns when to measure: each twice as late as the last, and the end."""
  ends = {*range(every, steps, every), steps}
  wanted = {steps / 2**i for i in range(points)}
  return {min(ends, key=lambda e, w=w: (abs(e - w), e)) for w in wanted} | {
    steps
  }


def at(row: Row, name: str, read: int | None) -> float:
  """Returns a curve's value at its end, or after so many tokens.

  Args:
    row: with `read`, tokens so far, and the curve beside it.
    name: of the curve.
    read: None for the end; between two points the curve is straight in log
      tokens.
  """
  if read is None:
    return row[name][-1]
  return float(np.interp(np.log(read), np.log(row["read"]), row[name]))
