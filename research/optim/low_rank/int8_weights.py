"""Weights in eight bits that are trained: no copy of them in full is kept.

A move is added to the decoded matrix, and the sum is encoded with codes drawn
such that their mean is the sum, but at the ends of a group: beyond 0 and 255
there are none, and what is clipped there moves the mean inwards, by less than a
step. Small moves, which rounding to nearest would lose one by one, count in the
mean. Zhang et al. 2024 (Q-GaLore,
arXiv:2407.08296), section 3.4, as its authors' code has it.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from research import tree, weights
from research.optim import muon
from research.optim.low_rank import projectors
from research.typing import (
  Array,
  Float,
  Params,
  PRNGKey,
  UserError,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Tensor(weights.Weight):
  """A matrix as codes 0 to 255 times a step, in groups.

  Attributes:
    codes: `[..., out in / group, group]` in the C order of `[out, in]`, uint8.
    step: of each group.
    zero: the code of 0 of each group, uint8.
    sizes: (in, out); static.
  """

  codes: Any
  step: Any
  zero: Any
  sizes: tuple[int, int] = dataclasses.field(metadata=dict(static=True))

  is_renewable = True

  @property
  def shape(self) -> tuple[int, ...]:
    """Returns the logical shape."""
    return (*self.codes.shape[:-2], *self.sizes)

  @property
  def dtype(self) -> Any:
    """Returns the logical type."""
    return self.step.dtype

  def dense(self) -> Float[Array, "..."]:
    """Returns the matrix."""
    x = self.step * (self.codes.astype(self.dtype) - self.zero)
    size_in, size_out = self.sizes
    x = x.reshape(*self.codes.shape[:-2], size_out, size_in)
    return jnp.swapaxes(x, -1, -2)

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `einsum(eq, x, w)`; decoded again for the backward pass."""
    return jax.checkpoint(lambda x, w: weights.einsum(eq, x, w.dense()))(
      x, self
    )

  def axes(self, names: tuple[str | None, ...]) -> "Int8Tensor":
    """Groups follow rows across both axes: no mesh cuts them."""
    lead = (*names[:-2], None, None)
    parts = {
      f: weights.axes(getattr(self, f), lead) for f in ("codes", "step", "zero")
    }
    return dataclasses.replace(self, **parts)

  def renewed(self, x: Float[Array, "..."], key: PRNGKey) -> "Int8Tensor":
    """Returns `x` in this form, up or down by chance."""
    return encode(x, self.codes.shape[-1], key)


def encode(
  x: Float[Array, "*B I O"], group: int = 256, key: PRNGKey | None = None
) -> Int8Tensor:
  """Returns a matrix in eight bits.

  Args:
    x: the matrix.
    group: numbers that share a step.
    key: of stochastic rounding; None to round to nearest.

  Raises:
    UserError: groups do not divide the matrix.
  """
  *lead, size_in, size_out = x.shape
  if size_in * size_out % group:
    raise UserError(
      f"Int8Tensor: groups of {group} do not divide {size_in} x {size_out}.\n"
      f"Expected a divisor of {size_in * size_out}."
    )
  rows = jnp.swapaxes(x, -1, -2).reshape(*lead, -1, group)
  step, zero = projectors.steps(rows, 255)
  unit = rows / step
  if key is None:
    unit = jnp.round(unit)
  else:
    unit = jnp.floor(unit + jax.random.uniform(key, unit.shape, unit.dtype))
  codes = jnp.clip(unit + zero, 0, 255)
  return Int8Tensor(
    codes.astype(jnp.uint8), step, zero.astype(jnp.uint8), (size_in, size_out)
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pack:
  """Rounds matrices to eight bits, to be trained in them.

  Attributes:
    matrices: regular expression of their paths.
    group: numbers that share a step.
  """

  matrices: str = muon.MATRICES
  group: int = 256

  def __call__(self, params: Params, key: PRNGKey | None = None) -> Any:
    """Returns `params` in that form; all else stays as it is."""
    del key

    def one(path, x):
      return encode(x, self.group) if re.search(self.matrices, path) else x

    return tree.map_paths(one, params, is_leaf=weights.is_weight)
