"""Caches inputs of a layer's matrices during calibration.

Quantizing a layer's matrices one after the other runs the layer up to each of
them, and once more for its outputs. The inputs of `attention/o` and `mlp/down`
stay valid while no weight before them changes. A `CachedInputTensor` multiplies
cached inputs and ignores its argument, so XLA removes the computation of that
argument: measuring `gate` and `up` runs no attention, and the layer's outputs
take two products.
"""

import dataclasses
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from research import tree, weights
from research.taps.statistics import Arrays, Rows, Statistic
from research.typing import Array, Float, Int, Params, UserError

ROWS = "rows"

_BEHIND = {
  "attention/o": re.compile("attention/o$|mlp/"),
  "mlp/down": re.compile("mlp/down$"),
}
"""Cached matrix -> paths of weights that its inputs do not depend on."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CachedInputTensor(weights.WrappedWeight):
  """A matrix that multiplies cached inputs instead of its argument.

  Attributes:
    x: the cached inputs `[B, T, I]`.
  """

  w: Any
  x: Any

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    return weights.einsum(eq, self.x.astype(x.dtype), self.w)

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    return weights.take(self.w, ids)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    """Raises UserError: experts' inputs are not cached."""
    raise UserError(
      "CachedInputTensor: found experts, expected a matrix [I, O]"
    )

  def dense(self) -> Float[Array, "..."]:
    return weights.dense(self.w)

  def axes(self, names: tuple[str | None, ...]) -> "CachedInputTensor":
    inputs = weights.axes(self.x, ("batch", "length", names[-2]))
    return CachedInputTensor(weights.axes(self.w, names), inputs)

  def map_inner(self, f: Any) -> "CachedInputTensor":
    return dataclasses.replace(self, w=weights.map_inner(self.w, f))


@dataclasses.dataclass(frozen=True)
class StatisticAndRows:
  """A statistic that also returns the inputs themselves (`rows`), float32.

  Attributes:
    batch, length: shape of the rows, `[B, T]`.
  """

  statistic: Statistic
  batch: int
  length: int

  def shapes(self, size_in: int, size_out: int) -> dict[str, tuple[int, ...]]:
    shape = (self.batch, self.length, size_in)
    return self.statistic.shapes(size_in, size_out) | {ROWS: shape}

  def compute(self, rows: Rows) -> Arrays:
    if rows.sizes is None:  # a router's rows are flat
      kept = rows.x.astype(jnp.float32)
      kept = kept.reshape(self.batch, self.length, -1)
    else:  # experts' rows are sorted by expert, and not cached
      shape = (len(rows.sizes), self.batch, self.length, rows.x.shape[-1])
      kept = jnp.zeros(shape)
    return self.statistic.compute(rows) | {ROWS: kept}

  def join(self, a: Arrays, b: Arrays) -> Arrays:
    raise UserError("StatisticAndRows: rows of two batches cannot be joined")


@dataclasses.dataclass(frozen=True)
class CachedInputs:
  """Cached inputs of a matrix.

  Attributes:
    rows: the inputs of each batch, `[B, T, I]`.
  """

  params: Params
  rows: Sequence[Array]


def cacheable(params: Params, paths: Sequence[str]) -> list[str]:
  """Returns those of a layer's `paths` whose inputs can be cached."""
  sizes = {path: len(w.shape) for path, w in _flat(params)}
  return [p for p in paths if p in _BEHIND and sizes.get(p) == 2]


def still_valid(
  memory: Mapping[str, CachedInputs], params: Params
) -> dict[str, CachedInputs]:
  """Returns the cached inputs that `params` would also compute.

  These depend on identical arrays of both trees.
  """
  return {
    path: held
    for path, held in memory.items()
    if _same(_leading(held.params, path), _leading(params, path))
  }


def with_cached_inputs(
  params: Params, memory: Mapping[str, CachedInputs], batch: int
) -> Params:
  """Returns `params` whose cached matrices use the inputs of a batch.

  Args:
    memory: path -> cached inputs.
    batch: index of the batch.
  """

  def one(path, w):
    if path not in memory:
      return w
    rows = memory[path].rows[batch]
    return weights.map_inner(w, lambda w: CachedInputTensor(w, rows))

  return tree.map_paths(one, params, is_leaf=weights.is_weight)


def _flat(params):
  return weights.named_weights(params)


def _leading(params, path):
  """Returns the weights that the inputs of `path` depend on.

  They include the ops that `path` applies to its inputs, but not its matrix.
  """
  found = {p: w for p, w in _flat(params) if not _BEHIND[path].match(p)}
  own = dict(_flat(params))[path]
  return found | {path: weights.map_inner(own, lambda w: None)}


def _same(a, b):
  (a, kind), (b, other) = jax.tree.flatten(a), jax.tree.flatten(b)
  return kind == other and all(map(operator.is_, a, b))
