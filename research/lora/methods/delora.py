"""DeLoRA: a low-rank update whose length is bounded, whatever its factors are.

Bini et al. 2025 (arXiv:2503.18225), equation 6, with the norm of each input of
the base (PEFT's form).
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from research.lora.low_rank import low_rank
from research.lora.method import (
  Method,
  contracts_output,
  dense_fp32,
  uniform,
  zeros,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeLoRA(Method):
  """`diag(n) aᵀ diag(l / (r |a_i| |b_i|)) b`, `a [r, in]`, `b [r, out]`.

  `n [in]` are the norms of the base's rows, fixed; the bound `l [1]` is
  trained, too.

  Attributes:
    alpha: what l starts as.
  """

  alpha: float = 15.0

  PEFT: ClassVar = "DELORA"
  PEFT_PATTERNS: ClassVar = {"rank": "rank_pattern", "alpha": "lambda_pattern"}
  PEFT_DEFAULTS: ClassVar = dict(r=8, delora_lambda=15, module_dropout=0.0)

  def start(self, key, place, w, seen=None):
    a = uniform(key, (self.rank, place.size_in), place.size_in**-0.5)
    trained = dict(
      a=a,
      b=zeros(self.rank, place.size_out),
      l=jnp.full((1,), self.alpha, jnp.float32),
    )
    return trained, {"n": jnp.linalg.norm(dense_fp32(w), axis=1)}

  def _factors(self, p):
    """Returns what is multiplied: `[r, in]` and `[r, out]`."""
    a, b = dense_fp32(p["a"]), dense_fp32(p["b"])
    scale = dense_fp32(p["l"]) / (self.rank * _length(a) * _length(b))
    return a * dense_fp32(p["n"]), b * scale

  def delta(self, p, w):
    a, b = self._factors(p)
    return a.T @ b

  def branch(self, eq, x, p, w):
    a, b = self._factors(p)
    return low_rank(x, b, a) if contracts_output(eq) else low_rank(x, a, b)

  def axes(self, names):
    return dict(
      a=(None, names[0]), b=(None, names[1]), l=(None,), n=(names[0],)
    )

  def idle(self, p):
    return not (p["a"].any() and p["b"].any() and p["l"].any())

  def to_peft(self, p, place):
    return dict(
      delora_A=p["a"],
      delora_B=p["b"].T,
      delora_lambda=p["l"],
      delora_w_norm=p["n"],
    )

  def from_peft(self, tensors, place, w):
    trained = dict(
      a=tensors["delora_A"],
      b=tensors["delora_B"].T,
      l=tensors["delora_lambda"],
    )
    return trained, {"n": tensors["delora_w_norm"]}

  def peft_fields(self, methods):
    return dict(
      r=self.rank,
      delora_lambda=self.alpha,
      module_dropout=self.dropout,
      init_weights=True,
    )

  @classmethod
  def from_fields(cls, fields):
    return cls(
      rank=fields.integer("r"),
      alpha=fields.number("delora_lambda"),
      dropout=fields.rate("module_dropout"),
    )


def _length(x):
  """Returns the norm of each row, at least 1e-4, `[r, 1]`."""
  # Inside the root: the gradient of a root at 0 is no number.
  return jnp.sqrt(jnp.maximum(jnp.sum(x * x, 1, keepdims=True), 1e-8))
