"""Embeddings whose transpose is no longer the head, in one leaf's place.

A rotated model with tied embeddings has two matrices where there was one. The
model need not know: a leaf looks up in one and multiplies by the other.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research import weights
from research.nn.transformer import Transformer
from research.typing import (
  Array,
  Float,
  Int,
  Params,
  PRNGKey,
  Shaped,
  UserError,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Untied(weights.Weight):
  """An embedding `[V, D]` whose transpose, as a head, is another matrix.

  Attributes:
    table: rows that are looked up.
    head: `[V, D]`, what hidden states are multiplied by.
  """

  table: Any
  head: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return self.table.shape

  @property
  def dtype(self) -> Any:
    return self.table.dtype

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `einsum(eq, x, head)`."""
    return weights.einsum(eq, x, self.head)

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns rows of `table`."""
    return weights.take(self.table, ids)

  def ragged_dot(self, x: Any, sizes: Any) -> Any:
    """Raises: an embedding is not stacked experts."""
    raise UserError("an embedding is not a stack of experts")

  def dense(self) -> Shaped[Array, "..."]:
    """Returns `table`."""
    return weights.dense(self.table)

  def count(self) -> int:
    """Returns how many parameters both have."""
    return weights.count((self.table, self.head))

  def axes(self, names: tuple[str | None, ...]) -> "Untied":
    """Both have the embedding's names."""
    return Untied(*(weights.axes(w, names) for w in (self.table, self.head)))

  def bind(self, *, key: PRNGKey | None, ids: Any) -> "Untied":
    """Returns itself with what depends on the batch in its weights."""
    both = {"table": self.table, "head": self.head}
    return Untied(**weights.bind(both, key=key, ids=ids))


def untie(
  model: Transformer, params: Params
) -> tuple[Transformer, dict[str, Any]]:
  """Returns a model with a head of its own, for exports; the same otherwise."""
  embed = params["embed"]
  if not isinstance(embed, Untied):
    return model, dict(params)
  model = untie_model(model, params)
  head = jnp.swapaxes(weights.dense(embed.head), -1, -2)
  rest = {"embed": weights.dense(embed.table), "head": head}
  return model, dict(params) | rest


def untie_model(model: Transformer, params: Params) -> Transformer:
  """Returns the model of `untie`, for parameters or their shapes."""
  apart = isinstance(params["embed"], Untied)
  return model.clone(tied=False) if apart else model
