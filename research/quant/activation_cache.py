"""What a matrix was given, kept, so that what leads to it runs once.

A layer whose matrices are rounded in turn is computed up to each of them, and
once more for its outputs. What has been seen of `attention/o` and `mlp/down`
stays right while nothing before them changes; a `Replayed` matrix multiplies
what was kept, not what it is given, so what would lead to that is no part of
the compiled program: no attention for `gate` and `up`, and for the outputs
two products alone.
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
"""What is kept -> itself, and weights that do not lead to it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replayed(weights.WrappedWeight):
  """A matrix whose inputs are known, whatever it is given.

  Attributes:
    w: any weight `[I, O]`.
    x: its inputs `[B, T, I]`.
  """

  w: Any
  x: Any

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the product of the inputs that are known, in the dtype of `x`."""
    return weights.einsum(eq, self.x.astype(x.dtype), self.w)

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns rows of the matrix."""
    return weights.take(self.w, ids)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    """Raises UserError: experts' rows are not kept."""
    raise UserError("Replayed: found experts, expected a matrix [I, O]")

  def dense(self) -> Float[Array, "..."]:
    """Returns the matrix."""
    return weights.dense(self.w)

  def axes(self, names: tuple[str | None, ...]) -> "Replayed":
    """The matrix' names, and those of activations."""
    inputs = weights.axes(self.x, ("batch", "length", names[-2]))
    return Replayed(weights.axes(self.w, names), inputs)

  def within(self, f: Any) -> "Replayed":
    """Returns itself with `f` of the weight that multiplies."""
    return dataclasses.replace(self, w=weights.within(self.w, f))


@dataclasses.dataclass(frozen=True)
class WithRows:
  """A statistic, and the rows themselves beside it (`rows`), float32.

  Attributes:
    of_rows: the statistic.
    batch, length: how many rows there are, `[B, T]`.
  """

  of_rows: Statistic
  batch: int
  length: int

  def shapes(self, size_in: int, size_out: int) -> dict[str, tuple[int, ...]]:
    shape = (self.batch, self.length, size_in)
    return self.of_rows.shapes(size_in, size_out) | {ROWS: shape}

  def of(self, rows: Rows) -> Arrays:
    if rows.sizes is None:  # a router's are flat
      kept = rows.x.astype(jnp.float32)
      kept = kept.reshape(self.batch, self.length, -1)
    else:  # experts' are sorted, and nobody asks for them
      shape = (len(rows.sizes), self.batch, self.length, rows.x.shape[-1])
      kept = jnp.zeros(shape)
    return self.of_rows.of(rows) | {ROWS: kept}

  def join(self, a: Arrays, b: Arrays) -> Arrays:
    raise UserError("WithRows: rows of two calls are not joined")


@dataclasses.dataclass(frozen=True)
class Held:
  """What a matrix was given.

  Attributes:
    params: the layer's parameters that led there.
    rows: of each batch, `[B, T, I]`.
  """

  params: Params
  rows: Sequence[Array]


def keepable(params: Params, paths: Sequence[str]) -> list[str]:
  """Returns those of a layer's `paths` whose inputs can be kept."""
  sizes = {path: len(w.shape) for path, w in _flat(params)}
  return [p for p in paths if p in _BEHIND and sizes.get(p) == 2]


def valid(memory: Mapping[str, Held], params: Params) -> dict[str, Held]:
  """Returns what `params` would lead to as well: the very same arrays do."""
  return {
    path: held
    for path, held in memory.items()
    if _same(_leading(held.params, path), _leading(params, path))
  }


def replayed(params: Params, memory: Mapping[str, Held], batch: int) -> Params:
  """Returns `params` that multiply what is kept of a batch."""

  def one(path, w):
    if path not in memory:
      return w
    rows = memory[path].rows[batch]
    return weights.within(w, lambda w: Replayed(w, rows))

  return tree.map_paths(one, params, is_leaf=weights.is_weight)


def _flat(params):
  return weights.named(params)


def _leading(params, path):
  """Returns the weights that lead to what `path` is given.

  What a weight does to its inputs first belongs to these, its matrix does not.
  """
  found = {p: w for p, w in _flat(params) if not _BEHIND[path].match(p)}
  own = dict(_flat(params))[path]
  return found | {path: weights.within(own, lambda w: None)}


def _same(a, b):
  (a, kind), (b, other) = jax.tree.flatten(a), jax.tree.flatten(b)
  return kind == other and all(map(operator.is_, a, b))
