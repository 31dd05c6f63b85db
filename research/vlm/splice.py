"""Image features in the place of tokens: a weight that every model can read.

A prompt holds a placeholder token for each feature. The embedding table of the
language model becomes a `SplicedEmbedding`, which returns features where the
tokens are placeholders and rows of the table elsewhere. Objectives, samplers
and caches multiply by weights, so they need not know.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research import weights
from research.nn.transformer import Transformer
from research.typing import Array, Float, Int, Params, Shaped, UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplicedEmbedding(weights.WrappedWeight):
  """An embedding table whose placeholders are the features of each row.

  The i-th placeholder of a row gets the i-th feature of that row. A gather, so
  it is differentiable and has static shapes.

  Consecutive rows may share an entry of `features`, a pool: then placeholders
  are counted over these rows, one after the other.

  Attributes:
    w: the table `[V, D]`, any weight.
    features: `[G, P, D]` for B rows, a multiple of G; pools with fewer
      placeholders do not use the last.
    token: id of the placeholder, which may lie outside of the table.
  """

  w: Any
  features: Any
  token: int = dataclasses.field(metadata=dict(static=True))

  @property
  def extra_ids(self) -> tuple[int, ...]:
    """Returns the placeholder's id, which may be no row of the table."""
    return (self.token,)

  def dense(self) -> Shaped[Array, "..."]:
    """Returns the table."""
    return weights.dense(self.w)

  def axes(self, names: tuple[str | None, ...]) -> "SplicedEmbedding":
    """Returns the logical axis names of the table and of the features."""
    axes = weights.axes(self.w, names)
    return dataclasses.replace(self, w=axes, features=("batch", None, None))

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `einsum(eq, x, w)` in the dtype of `x`: a tied head."""
    return weights.einsum(eq, x, self.w)

  def take(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Returns features at placeholders, and embeddings elsewhere."""
    here = ids == self.token
    pools, size = self.features.shape[:2]
    if ids.shape[0] % pools:
      raise UserError(
        f"features: found {pools} rows of images for {ids.shape[0]} rows of"
        " tokens, expected a divisor"
      )
    # Of a pool's rows as one; a row for itself stays as it is.
    index = jnp.cumsum(here.reshape(pools, -1), axis=-1) - 1
    index = jnp.clip(index, 0, size - 1)
    soft = jnp.take_along_axis(self.features, index[..., None], axis=1)
    soft = soft.reshape(*ids.shape, -1)
    # An id outside of the table would read NaN, also where it is not used.
    words = weights.take(self.w, jnp.where(here, 0, ids))
    return jnp.where(here[..., None], soft.astype(words.dtype), words)


def with_features(
  params: Params, features: Float[Array, "G P D"], token: int
) -> dict[str, Any]:
  """Returns a language model's parameters with features at placeholders.

  Args:
    params: of a `Transformer`.
    features: of each row's images, or of the rows' of a pool, in the order of
      the placeholders, see `SplicedEmbedding`. A model
      that scales its embeddings scales these as well (`embed_scale`).
    token: id of the placeholder.
  """
  table = SplicedEmbedding(params["embed"], features, token)
  return {**params, "embed": table}


@dataclasses.dataclass(frozen=True)
class Splice:
  """Soft tokens are inputs of the language model, one for each placeholder."""

  def __call__(
    self,
    model: Transformer,
    params: Params,
    soft: Float[Array, "G P D"],
    views: int,
    token: int,
  ) -> dict[str, Any]:
    """Returns the language model's parameters, which see these images.

    Args:
      model: the language model.
      params: its parameters.
      soft: soft tokens of each row, or of each pool of rows, view by view.
      views: number of views in a row or pool.
      token: id of the placeholder.
    """
    del model, views
    return with_features(params, soft, token)
