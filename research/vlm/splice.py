"""Image features in the place of tokens: a weight that every model can read.

A prompt holds a placeholder token for each feature. The embedding table of the
language model becomes a `SplicedEmbedding`, which returns features where the
tokens are placeholders and rows of the table elsewhere. Objectives, samplers
and caches multiply by weights, so they need not know.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from research import weights
from research.nn.multimodal import (
  ImagePositions,
  InjectedFeatures,
  at_placeholders,
)
from research.nn.transformer import Transformer
from research.typing import Array, Float, Int, Params, Shaped, UserError

Onto = Literal["nothing", "embedding"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplicedEmbedding(weights.WrappedWeight):
  """An embedding table whose placeholders are the features of each row.

  The i-th placeholder of a row gets the i-th feature of that row. A gather, so
  it is differentiable and has static shapes.

  Attributes:
    w: the table `[V, D]`, any weight.
    features: `[B, P, D]`; rows with fewer placeholders do not use the last.
      With pools, `[B / pool, P, D]`.
    token: id of the placeholder, which may lie outside of the table.
    onto: what features are added to: nothing, or the placeholder's own row.
    pool: consecutive rows that share features: their placeholders are counted
      as if they were one row.
  """

  per_row = True

  w: Any
  features: Any
  token: int = dataclasses.field(metadata=dict(static=True))
  pool: int = dataclasses.field(default=1, metadata=dict(static=True))
  onto: Onto = dataclasses.field(default="nothing", metadata=dict(static=True))

  @property
  def extra_ids(self) -> tuple[int, ...]:
    return (self.token,)

  def dense(self) -> Shaped[Array, "..."]:
    return weights.dense(self.w)

  @property
  def row_count(self) -> int:
    return self.features.shape[0]

  def take_rows(self, rows: Int[Array, " N"]) -> "SplicedEmbedding":
    return dataclasses.replace(self, features=self.features[rows])

  def axes(self, names: tuple[str | None, ...]) -> "SplicedEmbedding":
    axes = weights.axes(self.w, names)
    return dataclasses.replace(self, w=axes, features=("batch", None, None))

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    return weights.einsum(eq, x, self.w)

  def take(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Returns features at placeholders, and embeddings elsewhere."""
    rows, here = at_placeholders(ids, self.features, self.token, self.pool)
    if self.onto == "embedding":
      words = weights.take(self.w, ids)
      return words + jnp.where(here[..., None], rows.astype(words.dtype), 0)
    # An id outside of the table would read NaN, also where it is not used.
    words = weights.take(self.w, jnp.where(here, 0, ids))
    return jnp.where(here[..., None], rows.astype(words.dtype), words)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("w",),
  meta_fields=("token", "row"),
)
@dataclasses.dataclass(frozen=True)
class RowOfImages(weights.WrappedWeight):
  """A table in which all placeholders have the same row.

  Attributes:
    w: the table `[V, D]`, any weight.
    token: id of the placeholder.
    row: theirs.
  """

  w: Any
  token: int
  row: int

  def dense(self) -> Shaped[Array, "..."]:
    return weights.dense(self.w)

  def axes(self, names: tuple[str | None, ...]) -> "RowOfImages":
    return dataclasses.replace(self, w=weights.axes(self.w, names))

  def take(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    return weights.take(self.w, jnp.where(ids == self.token, self.row, ids))


def with_features(
  params: Params,
  features: Float[Array, "G P D"],
  token: int,
  pool: int = 1,
  onto: Onto = "nothing",
) -> dict[str, Any]:
  """Returns a language model's parameters with features at placeholders.

  Args:
    features: of each row's images, in the order of its placeholders. A model
      that scales its embeddings scales these as well (`embed_scale`).
    pool: consecutive rows that share an entry of `features`.
    onto: see `SplicedEmbedding`.
  """
  table = SplicedEmbedding(params["embed"], features, token, pool, onto)
  return {**params, "embed": table}


@dataclasses.dataclass(frozen=True)
class Splice:
  """Soft tokens are inputs of the language model, one for each placeholder.

  Those of a connector that serves deeper layers as well (`DeepStack`) are wider
  than the language model, by whole multiples. A language model that rotates by
  several coordinates (`Rope.axes`) gets those of each image's grid.

  Attributes:
    onto: what soft tokens are added to: nothing, or the embedding of the
      placeholder, which then has a row (Molmo 2).
  """

  onto: Onto = "nothing"

  def __call__(
    self,
    model: Transformer,
    params: Params,
    soft: Float[Array, "G P D"],
    grids: Int[Array, "G V 2"],
    token: int,
    pool: int = 1,
  ) -> dict[str, Any]:
    """Returns the language model's parameters, which see these images.

    Args:
      soft: soft tokens of each row, or of each pool of rows, view by view.
      grids: rows and columns of soft tokens of each view; zeros for none.
      pool: rows that share their views.

    Raises:
      UserError: the soft tokens are no multiple of the language model's width,
        or serve more layers than it has; or rows share views of a model that
        rotates their tokens by axes, or adds features to deeper layers.
    """
    width = model.width
    deeper, rest = divmod(soft.shape[-1] - width, width)
    if rest or not 0 <= deeper < model.stack.depth:
      raise UserError(
        f"soft tokens: found a width of {soft.shape[-1]}, expected the language"
        f" model's {width}, or a multiple for its first layers"
      )
    rotates = rotates_by_axes(model)
    if pool > 1 and (deeper or rotates):
      raise UserError(
        f"images: found views that {pool} rows share, expected views of each"
        " row's own for this language model; set Bucket.pool = 1"
      )
    out = with_features(params, soft[..., :width], token, pool, self.onto)
    if deeper:
      more = soft[..., width:].reshape(*soft.shape[:2], deeper, width)
      out["injected"] = InjectedFeatures(more, token)
    if model.per_layer is not None:
      own = params["per_layer"]
      table = RowOfImages(own["embed"], token, model.per_layer.padding)
      out["per_layer"] = {**own, "embed": table}
    if rotates:
      out["rotary"] = ImagePositions(grids, token)
    return out


def rotates_by_axes(model: Transformer) -> bool:
  """Whether a language model rotates tokens by several coordinates."""
  ropes = [block.attention.rope for block in model.stack.blocks]
  return all(rope is not None and rope.axes is not None for rope in ropes)
