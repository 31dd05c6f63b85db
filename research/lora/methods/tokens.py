"""Rows of their own for some tokens, new ones say; PEFT's trainable tokens.

Everything else of the embedding stays as it is, and of a tied one the head's
side follows.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from research import weights
from research.lora.method import Method, contracts_output, dense_fp32
from research.typing import UserError

KEY, WITHIN = "trainable_tokens_delta", "token_adapter."
"""PEFT's name of the rows, and where it has them beside another method."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens(Method):
  """`rows [n, width]` instead of those that the base has for `ids`.

  Attributes:
    ids: of the tokens, none twice.
    side: of the matrix that counts tokens: 'in' of an embedding, 'out' of a
      head; set by `at`.
    beside: whether a file holds it beside another method.
  """

  ids: tuple[int, ...] = ()
  side: Literal["in", "out"] = "in"
  beside: bool = False

  PEFT: ClassVar = "TRAINABLE_TOKENS"
  VARIES: ClassVar = ("rank", "alpha", "side")
  DROPS: ClassVar = False
  PEFT_DEFAULTS: ClassVar = dict(token_indices=())

  def __post_init__(self):
    super().__post_init__()
    if any(type(i) is not int or i < 0 for i in self.ids):
      raise UserError(f"Tokens: ids are {self.ids[:9]}, expected token ids")
    if len(set(self.ids)) < len(self.ids):
      raise UserError("Tokens: ids hold a token twice, expected it once")

  def at(self, name, sizes):
    # Ours and theirs; LLaDA's last.
    out = name.endswith(("head", "transformer.ff_out"))
    return dataclasses.replace(self, side="out" if out else "in")

  def settled(self):
    return dataclasses.replace(self, beside=False)

  def start(self, key, place, w, seen=None):
    if not self.ids:
      raise UserError("Tokens: ids are empty, expected token ids")
    count = place.size_in if self.side == "in" else place.size_out
    if max(self.ids) >= count:
      raise UserError(
        f"Tokens: ids hold {max(self.ids)}, but there are {count} tokens; "
        "expected smaller ones, or a longer vocabulary first"
      )
    return {"rows": self._given(w)}, {}

  def _given(self, w):
    ids = jnp.asarray(self.ids)
    return (
      dense_fp32(weights.take(w, ids))
      if self.side == "in"
      else dense_fp32(w).T[ids]
    )

  def _moves(self, p, w):
    return p["rows"] - self._given(w)

  def delta(self, p, w):
    ids, moves = jnp.asarray(self.ids), self._moves(p, w)
    out = jnp.zeros(w.shape, moves.dtype)
    if self.side == "in":
      return out.at[ids].set(moves)
    return out.at[:, ids].set(moves.T)

  def branch(self, eq, x, p, w):
    ids, moves = jnp.asarray(self.ids), self._moves(p, w).astype(x.dtype)
    if contracts_output(eq) == (self.side == "out"):
      return x[..., ids] @ moves
    count = w.shape[-1] if self.side == "out" else w.shape[-2]
    out = jnp.zeros((*x.shape[:-1], count), x.dtype)
    return out.at[..., ids].set(x @ moves.T)

  def rows(self, ids, p, w):
    if self.side == "out":
      return super().rows(ids, p, w)
    own = jnp.full(w.shape[-2], -1).at[jnp.asarray(self.ids)]
    place = own.set(jnp.arange(len(self.ids)))[ids]
    found = jnp.take(self._moves(p, w), jnp.maximum(place, 0), axis=0)
    return jnp.where((place >= 0)[..., None], found, 0)

  def axes(self, names):
    return {"rows": (None, names[1 if self.side == "in" else 0])}

  def to_peft(self, p, place):
    return {f"{WITHIN if self.beside else ''}{KEY}": p["rows"]}

  def from_peft(self, tensors, place, w):
    (rows,) = tensors.values()
    return {"rows": rows}, {}

  def peft_fields(self, methods):
    return dict(token_indices=list(self.ids), init_weights=True)

  @classmethod
  def from_fields(cls, fields):
    return cls(ids=read_ids(fields, "token_indices"))


def read_ids(fields, name):
  """Returns the token ids in a field."""
  found = fields.get(name)
  if (
    not isinstance(found, list)
    or not found
    or any(type(i) is not int or not 0 <= i < 2**31 for i in found)
    or len(set(found)) < len(found)
  ):
    raise fields.wrong(name, "token ids, none of them twice")
  return tuple(found)
