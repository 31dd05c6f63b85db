"""LoRA, `w + s aᵀ b`, with rsLoRA's scale and several initialisations.

Hu et al. 2021 (arXiv:2106.09685), equation 3; rsLoRA: Kalajdzievski 2023
(arXiv:2312.03732). `a [r, in]`, `b [r, out]`.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from research import weights
from research.lora.low_rank import low_rank
from research.lora.method import (
  Method,
  contracts_output,
  dense_fp32,
  normal,
  uniform,
  zeros,
)
from research.typing import UserError

KEYS = {
  False: ("lora_A.weight", "lora_B.weight"),
  True: ("lora_embedding_A", "lora_embedding_B"),
}
"""PEFT's names of A and B; the key tells whether the module is an embedding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Method):
  """Low-rank adaptation.

  A new adapter leaves outputs exactly as they are, since b = 0 (a = 0 for an
  embedding, as in PEFT); see `init` for exceptions.

  Attributes:
    rslora: whether the scale is `alpha / sqrt(r)` instead of `alpha / r`.
    init: 'peft' draws a uniform in +-`in**-0.5` (PEFT's default), 'gaussian'
      normal with standard deviation `1 / r`. With 'orthogonal' both factors
      are nonzero and `aᵀb` is 0 up to rounding, so that both have gradients
      from the first step. With 'random' (PEFT's False, for tests) `aᵀb` is
      nonzero.
  """

  rslora: bool = False
  init: Literal["peft", "gaussian", "orthogonal", "random"] = "peft"

  PEFT: ClassVar = "LORA"
  PEFT_PATTERNS: ClassVar = {"rank": "rank_pattern", "alpha": "alpha_pattern"}
  PEFT_DEFAULTS: ClassVar = dict(r=8, lora_alpha=8, lora_dropout=0.0)

  @property
  def scale(self) -> float:
    return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

  @property
  def pair_scale(self):
    return self.scale

  @property
  def starts_as_base(self):
    return self.init != "random"

  def as_lora(self) -> "LoRA":
    """Returns the plain LoRA that computes the same from given arrays."""
    lora_fields = {
      f.name: getattr(self, f.name) for f in dataclasses.fields(LoRA)
    }
    return LoRA(**lora_fields)

  def init_arrays(self, key, spec, w, stats=None):
    r = self.rank
    size_in, size_out = spec.size_in, spec.size_out
    a, b = zeros(r, size_in), zeros(r, size_out)
    other = jax.random.fold_in(key, 1)
    if spec.embedding:
      b = normal(key, (r, size_out))
      if self.init == "random":
        a = normal(other, (r, size_in))
    elif self.init == "gaussian":
      a = normal(key, (r, size_in), 1 / r)
    elif self.init == "orthogonal":
      a, b = _orthogonal(key, r, size_in, size_out)
    else:
      # Equal to PEFT's Kaiming uniform with a = sqrt(5).
      a = uniform(key, (r, size_in), size_in**-0.5)
      if self.init == "random":
        b = uniform(other, (r, size_out), r**-0.5)
    return {"a": a, "b": b}, {}

  def delta(self, p, w):
    return self.scale * (dense_fp32(p["a"]).T @ dense_fp32(p["b"]))

  def branch(self, eq, x, p, w):
    first, second = (
      (p["b"], p["a"]) if contracts_output(eq) else (p["a"], p["b"])
    )
    # Scale the thin factor rather than the wide output.
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

  def is_noop(self, p):
    return not (p["a"].any() and p["b"].any())

  def to_peft(self, p, spec):
    a, b = KEYS[spec.embedding]
    return {a: p["a"], b: p["b"].T}

  def from_peft(self, tensors, spec, w):
    a, b = KEYS[spec.embedding]
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


def _orthogonal(key, rank, size_in, size_out):
  """Returns factors in orthogonal halves of the rank space.

  datta0.github.io/posts/rethink-lora-init; PEFT's `orthogonal_init`.
  """
  if rank % 2:
    raise UserError(
      f"LoRA: rank is {rank}, expected an even one for init 'orthogonal'"
    )
  key_q, key_a, key_b = jax.random.split(key, 3)
  q, _ = jnp.linalg.qr(normal(key_q, (rank, rank)))
  a = q[0::2].T @ normal(key_a, (rank // 2, size_in), 0.1)
  b = q[1::2].T @ normal(key_b, (rank // 2, size_out), 0.1)
  return a, b
