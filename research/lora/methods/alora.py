"""Activated LoRA: an adapter that acts from where it is called on.

Greenewald et al. 2025 (arXiv:2504.12397). Some tokens, the invocation, call
it: positions from their last occurrence to the end see the adapter, those
before see the base alone, bit by bit, whose cache they share.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research.lora.methods.lora import LoRA
from research.typing import Array, Bool, Int, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ALoRA(LoRA):
  """LoRA behind an invocation; cannot be merged.

  What multiplies has to know the tokens, see `weights.with_tokens`. Heads are
  not adapted: they are given single positions.

  Attributes:
    invocation: token ids that call the adapter.
  """

  invocation: tuple[int, ...] = ()

  GATED: ClassVar = True
  PEFT_FLAG: ClassVar = "alora_invocation_tokens"

  def __post_init__(self):
    super().__post_init__()
    wrong = [t for t in self.invocation if type(t) is not int or t < 0]
    if wrong:
      raise UserError(
        f"ALoRA: invocation holds {wrong[0]!r}, expected token ids"
      )

  def start(self, key, place, w, seen=None):
    if not self.invocation:
      raise UserError("ALoRA: invocation is empty, expected token ids")
    return super().start(key, place, w, seen)

  def active(self, tokens, segments=None):
    return after_last(tokens, self.invocation, segments)

  def delta(self, p, w):
    raise UserError(
      "ALoRA: acts from its invocation on, so there is no matrix to merge it "
      "into; use it beside its base"
    )

  def ragged(self, x, p, w, sizes):
    raise UserError("ALoRA: experts see rows without their tokens' places")

  def peft_fields(self, methods):
    own = dict(alora_invocation_tokens=list(self.invocation))
    return super().peft_fields(methods) | own

  @classmethod
  def from_fields(cls, fields):
    found = fields.get("alora_invocation_tokens")
    ok = isinstance(found, list) and 0 < len(found) <= 256
    if not ok or any(type(t) is not int or not 0 <= t < 2**31 for t in found):
      raise fields.wrong("alora_invocation_tokens", "token ids, at most 256")
    plain = super().from_fields(fields)
    return dataclasses.replace(plain, invocation=tuple(found))


def after_last(
  tokens: Int[Array, "B T"],
  wanted: tuple[int, ...],
  segments: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B T"]:
  """Returns which positions stand at or behind the last occurrence.

  Args:
    tokens: ids; padding is no id, such as -1, or has no segment.
    wanted: what occurs, at least one id.
    segments: from 0, which document of the row each token is of, each with
      an occurrence of its own; -1 for padding, which is never behind one.
  """
  rows, time = tokens.shape
  if segments is None:
    segments = jnp.zeros_like(tokens)
  found = jnp.ones((rows, time), bool)
  for k, token in enumerate(wanted):
    found &= _ahead(tokens, k, -1) == token
    found &= _ahead(segments, k, -1) == segments
  place = jnp.where(found & (segments >= 0), jnp.arange(time), -1)

  def row(place: Any, segments: Any) -> Any:
    # A row has no more documents than tokens.
    last = jax.ops.segment_max(place, segments, time)[segments]
    return (last >= 0) & (jnp.arange(time) >= last) & (segments >= 0)

  return jax.vmap(row)(place, segments)


def _ahead(x, k, fill):
  """Returns each row's elements `k` places ahead."""
  return jnp.pad(x, ((0, 0), (0, k)), constant_values=fill)[:, k:]
