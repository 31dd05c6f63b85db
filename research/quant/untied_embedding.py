"""Untied embedding: one leaf with separate embedding and head matrices.

Rotating a model with tied embeddings makes the head differ from the embedding.
This leaf takes the place of the tied embedding, looks up rows in one matrix and
multiplies by the other, so the model's code does not change.
"""

import dataclasses
from collections.abc import Callable
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
  """An embedding `[V, D]` and a different matrix for the tied head.

  Attributes:
    table: the embedding, `[V, D]`.
    head: the head, `[V, D]`, which multiplies hidden states.
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
    return weights.einsum(eq, x, self.head)

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    return weights.take(self.table, ids)

  def ragged_dot(self, x: Any, sizes: Any) -> Any:
    """Raises UserError: an embedding is not a stack of experts."""
    raise UserError("an embedding is not a stack of experts")

  def dense(self) -> Shaped[Array, "..."]:
    return weights.dense(self.table)

  def count(self) -> int:
    return weights.count((self.table, self.head))

  def axes(self, names: tuple[str | None, ...]) -> "Untied":
    return Untied(*(weights.axes(w, names) for w in (self.table, self.head)))

  def bind(self, *, key: PRNGKey | None, ids: Any) -> "Untied":
    both = {"table": self.table, "head": self.head}
    return Untied(**weights.bind(both, key=key, ids=ids))


def map_matrices(f: Callable[[Any], Any], w: Any) -> Any:
  """Returns an embedding after `f`, which also gets an untied one's head."""
  return Untied(f(w.table), f(w.head)) if isinstance(w, Untied) else f(w)


def untie(
  model: Transformer, params: Params
) -> tuple[Transformer, dict[str, Any]]:
  """Returns the model and parameters with a separate head, for export.

  A model without an `Untied` leaf is returned as it is.
  """
  embed = params["embed"]
  if not isinstance(embed, Untied):
    return model, dict(params)
  model = untie_model(model, params)
  head = jnp.swapaxes(weights.dense(embed.head), -1, -2)
  rest = {"embed": weights.dense(embed.table), "head": head}
  return model, dict(params) | rest


def untie_model(model: Transformer, params: Params) -> Transformer:
  """Returns the model of `untie`, given parameters or their shapes."""
  apart = isinstance(params["embed"], Untied)
  return model.clone(tied=False) if apart else model
