"""Features of images at the placeholders of a row, in its input or deeper."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from research import weights
from research.typing import Array, Bool, Float, Int, UserError


def at_placeholders(
  ids: Int[Array, "B T"],
  features: Float[Array, "G P *X"],
  token: int,
  pool: int = 1,
) -> tuple[Float[Array, "B T *X"], Bool[Array, "B T"]]:
  """Returns the feature of each token, and which tokens have one.

  The i-th placeholder of a row gets the i-th feature of that row. A gather, so
  it is differentiable and has static shapes; other tokens get any feature.

  Args:
    ids: complete rows of tokens.
    features: of each row, or of each pool; rows with fewer placeholders do not
      use the last.
    token: id of the placeholder.
    pool: consecutive rows that share features: their placeholders are counted
      as if they were one row.

  Raises:
    UserError: there are not as many pools as rows need.
  """
  here = ids == token
  counted = here
  if pool > 1:
    pools = features.shape[0]
    if ids.shape[0] != pools * pool:
      raise UserError(
        f"features: found {pools} pools of {pool} rows for {ids.shape[0]} rows"
        f" of tokens, expected {pools * pool}"
      )
    counted = here.reshape(pools, -1)
  index = jnp.cumsum(counted, axis=-1) - 1
  index = jnp.clip(index, 0, features.shape[1] - 1)
  index = index.reshape(*index.shape, *(1,) * (features.ndim - 2))
  rows = jnp.take_along_axis(features, index, axis=1)
  return rows.reshape(*ids.shape, *features.shape[2:]), here


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("features",),
  meta_fields=("token",),
)
@dataclasses.dataclass(frozen=True)
class InjectedFeatures(weights.Weight):
  """Features that are added after the first layers: DeepStack.

  Meng et al. 2024 (arXiv:2406.04334); Qwen3-VL (arXiv:2511.21631). It stands in
  the parameter tree as `injected`, since objectives and samplers pass
  parameters on and need not know.

  Attributes:
    features: `[B, P, J, D]`, for the outputs of layers 0 to J - 1.
    token: id of the placeholder.
  """

  per_row = True

  features: Any
  token: int

  @property
  def shape(self) -> tuple[int, ...]:
    """Returns the shape of the features."""
    return self.features.shape

  @property
  def dtype(self) -> Any:
    """Returns the features' dtype."""
    return self.features.dtype

  def dense(self) -> Float[Array, "B P J D"]:
    """Returns the features."""
    return self.features

  def axes(self, names: tuple[str | None, ...]) -> "InjectedFeatures":
    """Returns the logical axis names of the features."""
    del names
    return dataclasses.replace(self, features=("batch", None, None, None))

  def count(self) -> int:
    """Returns 0: these are activations."""
    return 0

  @property
  def row_count(self) -> int:
    """Returns the number of rows."""
    return self.features.shape[0]

  def take_rows(self, rows: Int[Array, " N"]) -> "InjectedFeatures":
    """Returns the features of chosen rows."""
    return dataclasses.replace(self, features=self.features[rows])

  def take(self, ids: Int[Array, "B T"]) -> Float[Array, "B T J D"]:
    """Returns features at placeholders, and zeros elsewhere."""
    found, here = at_placeholders(ids, self.features, self.token)
    return jnp.where(here[..., None, None], found, 0)
