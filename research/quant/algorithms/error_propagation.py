"""Quantization error propagation (QEP, GPTAQ): corrects for input drift.

After quantized layers a matrix receives inputs `y` instead of the original
model's inputs `x`. QEP (Arai and Ichikawa 2025, arXiv:2504.09629) and GPTAQ (Li
et al. 2025, arXiv:2504.02692) approximate the outputs for `x`: the least
squares solution is `w + (Σ y yᵀ)⁻¹ (Σ y (x - y)ᵀ) w`, and `algorithms.gptq`
applies a share of this correction. To measure both inputs in one pass, batches
contain pairs of rows: first those of the original model, then those of the
quantized one.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research import tree, weights
from research.typing import Array, Float, Int, Params, UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairedWeight(weights.Weight):
  """Two matrices: one multiplies the first half of the rows, one the second.

  Attributes:
    old, new: weights of equal shape, of any kind.
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
    old, new = jnp.split(x, 2)
    return jnp.concatenate(
      [weights.einsum(eq, old, self.old), weights.einsum(eq, new, self.new)]
    )

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    return weights.take(self.new, ids)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    """Raises UserError: experts' rows are sorted, which mixes the halves."""
    raise UserError(
      "GPTQ.drift: found experts, whose inputs cannot be paired, expected "
      "drift = 0"
    )

  def dense(self) -> Float[Array, "..."]:
    return weights.dense(self.new)

  def axes(self, names: tuple[str | None, ...]) -> "PairedWeight":
    return PairedWeight(
      weights.axes(self.old, names), weights.axes(self.new, names)
    )


def pair_weights(old: Params, new: Params) -> Params:
  """Returns the new layer with each matrix paired with the old one's."""
  before = dict(_matrices(old))

  def one(path, w):
    if path not in before:
      return w
    held = weights.inner(before[path])
    return weights.map_inner(w, lambda w: PairedWeight(held, w))

  return tree.map_paths(one, new, is_leaf=weights.is_weight)


def _matrices(layer):
  return [
    (path, w) for path, w in weights.named_weights(layer) if len(w.shape) > 1
  ]


@dataclasses.dataclass(frozen=True)
class DriftStatistic:
  """Statistic of paired rows: old rows `x`, then new rows `y`.

  Sums over rows `y yᵀ` (`xx`), `(x - y) yᵀ` (`drift`) and their count (`n`)."""

  def shapes(self, size_in, size_out):
    square = (size_in, size_in)
    return dict(xx=square, drift=square, n=(1,))

  def compute(self, rows):
    old, new = jnp.split(rows.x.astype(jnp.float32), 2)
    n = jnp.full((1,), new.size // new.shape[-1], jnp.float32)
    return dict(xx=rows.outer(new, new), drift=rows.outer(old - new, new), n=n)

  def join(self, a, b):
    return jax.tree.map(jnp.add, a, b)
