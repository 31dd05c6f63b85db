"""Weighted sums of adapters, PEFT's `add_weighted_adapter`."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float

from research import progress
from research.lora.lora_factors import Factors, thin_svd, truncate
from research.lora.merge.combinations import (
  COMBINATIONS,
  Combination,
  Elect,
)
from research.typing import PRNGKey, UserError


def add_weighted(
  adapters: Sequence[Mapping[str, Factors]],
  weights: Sequence[float],
  how: str,
  *,
  rank: int | None = None,
  density: float = 1.0,
  elect: Elect = "total",
  key: PRNGKey | None = None,
) -> dict[str, Factors]:
  """Returns one adapter, scale 1, that is a weighted sum of several.

  Args:
    adapters: factors by address; a matrix counts those that have it.
    weights: one for each adapter; may be negative.
    how: `cat` (exact, ranks add up), `svd` (the best of one rank), or another
      of `COMBINATIONS`.
    rank: rank of what is decomposed again; None for the adapters' largest.
    density: share of the entries that is left, where some are dropped.
    elect: a sign by the sum of the entries or by their number.

  Raises:
    UserError: the numbers do not fit each other, or the ranks do not where
      factors are summed.
  """
  if how not in COMBINATIONS:
    raise UserError(f"{how!r}: expected one of {', '.join(COMBINATIONS)}")
  combination = COMBINATIONS[how]
  if not adapters or len(adapters) != len(weights):
    raise UserError(
      f"{len(adapters)} adapters and {len(weights)} weights: expected one "
      "weight for each of at least one adapter"
    )
  if not np.isfinite(weights).all():
    raise UserError(f"weights are {list(weights)}, expected finite numbers")
  if not 0 < density <= 1:
    raise UserError(f"density is {density}, expected above 0 and at most 1")
  if rank is not None and rank < 1:
    raise UserError(f"rank is {rank}, expected at least 1")
  if "key" in combination.options and key is None:
    raise UserError(f"{how}: drops entries at random and needs a key")
  most = rank or max(f.rank for a in adapters for f in a.values())
  out = {}
  paths = list(dict.fromkeys(path for a in adapters for path in a))
  for path in progress.track(paths, "combining matrices"):
    pairs = zip(adapters, weights, strict=True)
    parts = [(a[path], float(w)) for a, w in pairs if path in a]
    if combination.of == "concatenation":
      out[path] = _concatenated(parts)
    elif combination == Combination("update"):
      thin = _concatenated(parts)
      out[path] = truncate(thin_svd(thin.a, thin.b), most)
    else:
      mix = _Mix(combination, density, elect, key, path)
      summed = _of_updates if combination.of == "update" else _of_factors
      out[path] = summed(mix, parts, most)
  return out


def _concatenated(parts: Sequence[tuple[Factors, float]]) -> Factors:
  a = [np.float32(w * f.scale) * f.a for f, w in parts]
  return Factors(
    np.concatenate(a, -2), np.concatenate([f.b for f, _ in parts], -2)
  )


@dataclasses.dataclass(frozen=True)
class _Mix:
  """A combination with its numbers, at one matrix."""

  combination: Combination
  density: float
  elect: Elect
  key: PRNGKey | None
  path: str

  def __call__(self, arrays, weights, salt: int) -> np.ndarray:
    """Returns the sum of equally shaped arrays; `salt` tells draws apart."""
    left = [self._left(x, 2 * i + salt) for i, x in enumerate(arrays)]
    x = np.stack(left).astype(np.float32)
    w = np.asarray(weights, np.float32).reshape(-1, *(1,) * (x.ndim - 1))
    if self.combination.signs == "any":
      return (w * x).sum(0)
    agree = np.sign(x) == elected(x, self.elect)
    return (w * x * agree).sum(0) / np.maximum(agree.sum(0), 1)

  def _left(self, x, salt):
    if self.combination.keep == "all" or self.density >= 1:
      return x
    if self.combination.keep == "largest":
      return largest(x, self.density)
    key = jax.random.fold_in(self.key, zlib.crc32(self.path.encode()))
    key = jax.random.fold_in(key, salt)
    kept = np.asarray(jax.random.bernoulli(key, self.density, x.shape))
    return x * kept / np.float32(self.density)


def largest(
  x: Float[np.ndarray, "..."], density: float
) -> Float[np.ndarray, "..."]:
  """Returns `x` with all but that share of its largest entries zeroed."""
  count = int(density * x.size)
  out = np.zeros_like(x).reshape(-1)
  if count:
    rows = np.argpartition(-np.abs(x.reshape(-1)), count - 1)[:count]
    out[rows] = x.reshape(-1)[rows]
  return out.reshape(x.shape)


def elected(x: Float[np.ndarray, "N ..."], elect: Elect) -> np.ndarray:
  """Returns the sign, 1 or -1, of each entry's majority; a draw is 1."""
  votes = x if elect == "total" else np.sign(x)
  return np.where(votes.sum(0) >= 0, 1, -1)


def _of_updates(mix: _Mix, parts, rank: int) -> Factors:
  deltas = [f.delta() for f, _ in parts]
  x = mix(deltas, [w for _, w in parts], 0)
  return truncate(np.linalg.svd(x, full_matrices=False), rank)


def _of_factors(mix: _Mix, parts, rank: int) -> Factors:
  del rank  # the factors' own
  ranks = {f.rank for f, _ in parts}
  if len(ranks) > 1:
    raise UserError(
      f"{mix.path}: ranks are {sorted(ranks)}, expected equal ones where "
      "factors are summed; use cat or svd"
    )
  scales = np.array([w * f.scale for f, w in parts])
  roots = np.sqrt(np.abs(scales))
  # The sign on one side alone: on both it would cancel.
  signs = np.where(scales >= 0, 1, -1)
  a = mix([f.a for f, _ in parts], roots * signs, 0)
  return Factors(a, mix([f.b for f, _ in parts], roots, 1))
