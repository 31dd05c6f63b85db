"""LoRA: `w + s aᵀ b`, and what only chooses `s` or the start.

Hu et al. 2021 (arXiv:2106.09685), equation 3; rsLoRA: Kalajdzievski 2023
(arXiv:2312.03732). `a [r, in]`, `b [r, out]`.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from research import weights
from research.lora.low_rank import low_rank
from research.lora.method import Method, normal, turned, uniform, wide, zeros

KEYS = {
  False: ("lora_A.weight", "lora_B.weight"),
  True: ("lora_embedding_A", "lora_embedding_B"),
}
"""PEFT's names of A and B, by whether the module is an embedding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Method):
  """Two thin factors.

  A new adapter computes exactly what its base does: b = 0 (for an embedding
  a = 0, as in PEFT).

  Attributes:
    rslora: scale `alpha / sqrt(r)` instead of `alpha / r`.
    init: of a: uniform within `in**-0.5` (PEFT's default), or normal with
      standard deviation `1 / r`.
  """

  rslora: bool = False
  init: Literal["peft", "gaussian"] = "peft"

  PEFT: ClassVar = "LORA"
  PEFT_PATTERNS: ClassVar = {"rank": "rank_pattern", "alpha": "alpha_pattern"}
  PEFT_DEFAULTS: ClassVar = dict(r=8, lora_alpha=8, lora_dropout=0.0)

  @property
  def scale(self) -> float:
    """`s`; never trained."""
    return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

  def plain(self) -> "LoRA":
    """Returns what computes the same once a start has been made."""
    own = {f.name: getattr(self, f.name) for f in dataclasses.fields(LoRA)}
    return LoRA(**own)

  def start(self, key, place, w, seen=None):
    r = self.rank
    if place.embedding:
      b = normal(key, (r, place.size_out))
      return {"a": zeros(r, place.size_in), "b": b}, {}
    shape = (r, place.size_in)
    if self.init == "gaussian":
      a = normal(key, shape, 1 / r)
    else:
      # Kaiming uniform with a = sqrt(5), which is what PEFT calls for.
      a = uniform(key, shape, place.size_in**-0.5)
    return {"a": a, "b": zeros(r, place.size_out)}, {}

  def delta(self, p, w):
    return self.scale * (wide(p["a"]).T @ wide(p["b"]))

  def branch(self, eq, x, p, w):
    first, second = (p["b"], p["a"]) if turned(eq) else (p["a"], p["b"])
    # The scale rides on a thin factor, never on the wide output.
    second = second * jnp.asarray(self.scale, second.dtype)
    return low_rank(x, first, second)

  def rows(self, ids, p, w):
    z = jnp.take(p["a"], ids, axis=-1)  # [r, ...]
    return jnp.einsum("r...,rd->...d", z, p["b"]) * self.scale

  def ragged(self, x, p, w, sizes):
    z = weights.ragged_dot(x, jnp.swapaxes(p["a"], -1, -2), sizes)
    return weights.ragged_dot(z, p["b"] * self.scale, sizes)

  def axes(self, names):
    return {"a": (None, names[0]), "b": (None, names[1])}

  def idle(self, p):
    return not (p["a"].any() and p["b"].any())

  def to_peft(self, p, place):
    a, b = KEYS[place.embedding]
    return {a: p["a"], b: p["b"].T}

  def from_peft(self, tensors, place, w):
    a, b = KEYS[place.embedding]
    return {"a": tensors[a], "b": tensors[b].T}, {}

  def peft_fields(self, methods):
    return dict(
      r=self.rank,
      lora_alpha=self.alpha,
      lora_dropout=self.dropout,
      use_rslora=self.rslora,
      fan_in_fan_out=False,
      use_dora=False,
      init_lora_weights=True,
    )

  @classmethod
  def from_fields(cls, fields):
    return cls(
      rank=fields.integer("r"),
      alpha=fields.number("lora_alpha"),
      dropout=fields.rate("lora_dropout"),
      rslora=fields.flag("use_rslora"),
    )
