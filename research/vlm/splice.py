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
from research.typing import Array, Float, Int, Params, Shaped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplicedEmbedding(weights.WrappedWeight):
  """An embedding table whose placeholders are the features of each row.

  The i-th placeholder of a row gets the i-th feature of that row. A gather, so
  it is differentiable and has static shapes.

  Attributes:
    w: the table `[V, D]`, any weight.
    features: `[B, P, D]`; rows with fewer placeholders do not use the last.
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
    index = jnp.cumsum(here, axis=-1) - 1
    index = jnp.clip(index, 0, self.features.shape[1] - 1)
    rows = jnp.take_along_axis(self.features, index[..., None], axis=1)
    # An id outside of the table would read NaN, also where it is not used.
    words = weights.take(self.w, jnp.where(here, 0, ids))
    return jnp.where(here[..., None], rows.astype(words.dtype), words)


def with_features(
  params: Params, features: Float[Array, "B P D"], token: int
) -> dict[str, Any]:
  """Returns a language model's parameters with features at placeholders.

  Args:
    params: of a `Transformer`.
    features: of each row's images, in the order of its placeholders. A model
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
    soft: Float[Array, "B P D"],
    views: int,
    token: int,
  ) -> dict[str, Any]:
    """Returns the language model's parameters, which see these images.

    Args:
      model: the language model.
      params: its parameters.
      soft: each row's soft tokens, view by view.
      views: number of views in a row.
      token: id of the placeholder.
    """
    del model, views
    return with_features(params, soft, token)
