"""Activated LoRA (aLoRA): an adapter active from its invocation tokens on.

Greenewald et al. 2025 (arXiv:2504.12397). Positions from the last occurrence
of the invocation tokens to the end use the adapter. Earlier positions use the
base alone, bit for bit, so they can share the base's KV cache.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research.lora.methods.lora import LoRA
from research.ranges import NonNegativeInt
from research.typing import Array, Bool, Int, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ALoRA(LoRA):
  """LoRA that is active after an invocation; cannot be merged.

  The weights need the batch's tokens, see `weights.with_tokens`. The head
  cannot be adapted, since it receives single positions.
  """

  invocation: tuple[NonNegativeInt, ...] = ()

  GATED: ClassVar = True
  PEFT_FLAG: ClassVar = "alora_invocation_tokens"

  def init_arrays(self, key, spec, w, stats=None):
    if not self.invocation:
      raise UserError("ALoRA: invocation is empty, expected token ids")
    return super().init_arrays(key, spec, w, stats)

  def active(self, tokens, segments=None):
    return from_last_match(tokens, self.invocation, segments)

  def delta(self, p, w):
    raise UserError(
      "ALoRA: cannot be merged: it acts only after its invocation; use it "
      "unmerged, on top of its base"
    )

  def ragged(self, x, p, w, sizes):
    raise UserError(
      "ALoRA: experts cannot be adapted: their rows have no token positions"
    )

  def peft_fields(self, methods):
    alora_fields = dict(alora_invocation_tokens=list(self.invocation))
    return super().peft_fields(methods) | alora_fields

  @classmethod
  def from_fields(cls, fields):
    token_ids = fields.get("alora_invocation_tokens")
    ok = isinstance(token_ids, list) and 0 < len(token_ids) <= 256
    if not ok or any(
      type(t) is not int or not 0 <= t < 2**31 for t in token_ids
    ):
      raise fields.wrong("alora_invocation_tokens", "token ids, at most 256")
    plain = super().from_fields(fields)
    return dataclasses.replace(plain, invocation=tuple(token_ids))


def from_last_match(
  tokens: Int[Array, "B T"],
  pattern: tuple[int, ...],
  segments: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B T"]:
  """Returns which positions are at or after the last match of a sequence.

  Args:
    tokens: token ids; padding is a negative id or has segment -1.
    pattern: token ids to match, at least one.
    segments: index from 0 of each token's document in its row; each document
      is searched separately. -1 for padding, which is never after a match.
  """
  rows, time = tokens.shape
  if segments is None:
    segments = jnp.zeros_like(tokens)
  matches = jnp.ones((rows, time), bool)
  for k, token in enumerate(pattern):
    matches &= _shift_left(tokens, k, -1) == token
    matches &= _shift_left(segments, k, -1) == segments
  place = jnp.where(matches & (segments >= 0), jnp.arange(time), -1)

  def row(place: Any, segments: Any) -> Any:
    # A row has at most as many documents as tokens.
    last = jax.ops.segment_max(place, segments, time)[segments]
    return (last >= 0) & (jnp.arange(time) >= last) & (segments >= 0)

  return jax.vmap(row)(place, segments)


def _shift_left(x, k, fill):
  return jnp.pad(x, ((0, 0), (0, k)), constant_values=fill)[:, k:]
