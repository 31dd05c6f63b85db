"""Inputs that have drifted: two models' rows through one walk.

Behind rounded layers a matrix is given other inputs `y` than the `x` that it
was made for. QEP (Arai and Ichikawa 2025, arXiv:2504.09629) and GPTAQ (Li et
al. 2025, arXiv:2504.02692) aim at the outputs of the latter: the least squares
answer is `w + (Σ y yᵀ)⁻¹ (Σ y (x - y)ᵀ) w`, of which `algorithms.gptq`
takes a share. To see both at once, rows go through a layer in pairs: those of
the old model first, then as many of the new one.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research import tree, weights
from research.typing import Array, Float, Int, Params, UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair(weights.Weight):
  """A weight that is one matrix for the first half of rows, and another then.

  Attributes:
    old, new: matrices of one shape, of any kind.
  """

  old: Any
  new: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return self.old.shape

  @property
  def dtype(self) -> Any:
    return self.old.dtype

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns each half of the rows of `x` times its own matrix."""
    old, new = jnp.split(x, 2)
    return jnp.concatenate(
      [weights.einsum(eq, old, self.old), weights.einsum(eq, new, self.new)]
    )

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns rows of the new matrix."""
    return weights.take(self.new, ids)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    """Raises UserError: experts' rows come sorted, the halves mixed."""
    raise UserError(
      "GPTQ.drift: experts cannot be walked in pairs, expected drift = 0"
    )

  def dense(self) -> Float[Array, "..."]:
    """Returns the new matrix."""
    return weights.dense(self.new)

  def axes(self, names: tuple[str | None, ...]) -> "Pair":
    """Both have the same names."""
    return Pair(weights.axes(self.old, names), weights.axes(self.new, names))


def paired(old: Params, new: Params) -> Params:
  """Returns a layer whose matrices are pairs; the rest is the new one's."""
  before = dict(_matrices(old))

  def one(path, w):
    if path not in before:
      return w
    held = weights.inner(before[path])
    return weights.within(w, lambda w: Pair(held, w))

  return tree.map_paths(one, new, is_leaf=weights.is_weight)


def _matrices(layer):
  return [(path, w) for path, w in weights.named(layer) if len(w.shape) > 1]


@dataclasses.dataclass(frozen=True)
class Drift:
  """Sums over the new rows `y`: `y yᵀ` (`xx`), rows (`n`), and `(x - y) yᵀ`
  with the old rows `x` (`drift`)."""

  def shapes(self, size_in, size_out):
    square = (size_in, size_in)
    return dict(xx=square, drift=square, n=(1,))

  def of(self, rows):
    old, new = jnp.split(rows.x.astype(jnp.float32), 2)
    n = jnp.full((1,), new.size // new.shape[-1], jnp.float32)
    return dict(xx=rows.outer(new, new), drift=rows.outer(old - new, new), n=n)

  def join(self, a, b):
    return jax.tree.map(jnp.add, a, b)
