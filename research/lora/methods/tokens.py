"""Trainable tokens (PEFT): trains the embedding rows of selected tokens.

All other rows are unchanged. With a tied embedding the head uses the trained
rows as well.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from research import weights
from research.lora.method import Method, contracts_output, dense_fp32
from research.ranges import NonNegativeInt
from research.typing import UserError

KEY, NESTED_PREFIX = "trainable_tokens_delta", "token_adapter."
"""PEFT's name of the rows, and its prefix if combined with another method."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens(Method):
  """`rows [n, width]`, which replace the base's rows of the tokens `ids`.

  Attributes:
    ids: distinct token ids.
    side: the matrix's vocabulary axis: 'in' for an embedding, 'out' for a
      head; set by `for_matrix`.
    beside: whether a file combines it with another method.
  """

  ids: tuple[NonNegativeInt, ...] = ()
  side: Literal["in", "out"] = "in"
  beside: bool = False

  PEFT: ClassVar = "TRAINABLE_TOKENS"
  PER_MODULE: ClassVar = ("rank", "alpha", "side")
  SUPPORTS_DROPOUT: ClassVar = False
  PEFT_DEFAULTS: ClassVar = dict(token_indices=())

  def __post_init__(self):
    super().__post_init__()
    if len(set(self.ids)) < len(self.ids):
      raise UserError("Tokens: ids hold a token twice, expected it once")

  def for_matrix(self, name, sizes):
    # Our name of the head, PEFT's, and LLaDA's.
    out = name.endswith(("head", "transformer.ff_out"))
    return dataclasses.replace(self, side="out" if out else "in")

  def canonical(self):
    return dataclasses.replace(self, beside=False)

  def init_arrays(self, key, spec, w, stats=None):
    if not self.ids:
      raise UserError("Tokens: ids are empty, expected token ids")
    count = spec.size_in if self.side == "in" else spec.size_out
    if max(self.ids) >= count:
      raise UserError(
        f"Tokens: ids hold {max(self.ids)}, but there are {count} tokens; "
        "expected smaller ones, or a longer vocabulary first"
      )
    return {"rows": self._base_rows(w)}, {}

  def _base_rows(self, w):
    ids = jnp.asarray(self.ids)
    return (
      dense_fp32(weights.take(w, ids))
      if self.side == "in"
      else dense_fp32(w).T[ids]
    )

  def _row_updates(self, p, w):
    return p["rows"] - self._base_rows(w)

  def delta(self, p, w):
    ids, updates = jnp.asarray(self.ids), self._row_updates(p, w)
    out = jnp.zeros(w.shape, updates.dtype)
    if self.side == "in":
      return out.at[ids].set(updates)
    return out.at[:, ids].set(updates.T)

  def branch(self, eq, x, p, w):
    ids, updates = (
      jnp.asarray(self.ids),
      self._row_updates(p, w).astype(x.dtype),
    )
    if contracts_output(eq) == (self.side == "out"):
      return x[..., ids] @ updates
    count = w.shape[-1] if self.side == "out" else w.shape[-2]
    out = jnp.zeros((*x.shape[:-1], count), x.dtype)
    return out.at[..., ids].set(x @ updates.T)

  def rows(self, ids, p, w):
    if self.side == "out":
      return super().rows(ids, p, w)
    places = jnp.full(w.shape[-2], -1).at[jnp.asarray(self.ids)]
    place = places.set(jnp.arange(len(self.ids)))[ids]
    updates = jnp.take(self._row_updates(p, w), jnp.maximum(place, 0), axis=0)
    return jnp.where((place >= 0)[..., None], updates, 0)

  def axes(self, names):
    return {"rows": (None, names[1 if self.side == "in" else 0])}

  def to_peft(self, p, spec):
    return {f"{NESTED_PREFIX if self.beside else ''}{KEY}": p["rows"]}

  def from_peft(self, tensors, spec, w):
    (rows,) = tensors.values()
    return {"rows": rows}, {}

  def peft_fields(self, methods):
    return dict(token_indices=list(self.ids), init_weights=True)

  @classmethod
  def from_fields(cls, fields):
    return cls(ids=read_ids(fields, "token_indices"))


def read_ids(fields, name):
  """Returns the distinct token ids in a field of a configuration.

  Raises:
    UserError: it is no list of distinct token ids.
  """
  ids = fields.get(name)
  if (
    not isinstance(ids, list)
    or not ids
    or any(type(i) is not int or not 0 <= i < 2**31 for i in ids)
    or len(set(ids)) < len(ids)
  ):
    raise fields.wrong(name, "token ids, none of them twice")
  return tuple(ids)
