"""GraLoRA: a low-rank pair for each of k x k blocks of the matrix.

Jung et al. 2025 (arXiv:2505.20355), section 3: k times the rank of LoRA with
the same number of parameters.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from research.lora.method import Method, contracts_output, uniform, zeros
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraLoRA(Method):
  """`a [k, in/k, r]`, `b [k, r, out/k]`; block (i, j) has rank `r / k`.

  Attributes:
    blocks: `k`; divides both sizes and the rank.
  """

  rank: int = 32
  alpha: float = 64.0
  blocks: int = 2

  PEFT: ClassVar = "GRALORA"
  VARIES: ClassVar = ()
  PEFT_DEFAULTS: ClassVar = dict(
    r=32, alpha=64, gralora_k=2, gralora_dropout=0.0
  )

  def start(self, key, place, w, seen=None):
    k, r = self.blocks, self.rank
    for name, n in (
      ("rank", r),
      ("in", place.size_in),
      ("out", place.size_out),
    ):
      if n % k:
        raise UserError(f"GraLoRA: {name} {n} is not a multiple of blocks {k}")
    size = place.size_in // k
    a = uniform(key, (k, size, r), size**-0.5)
    return {"a": a, "b": zeros(k, r, place.size_out // k)}, {}

  def delta(self, p, w):
    return self._product(jnp.eye(w.shape[-2]), p)

  def branch(self, eq, x, p, w):
    if contracts_output(eq):
      return super().branch(eq, x, p, w)
    return self._product(x, p)

  def _product(self, x, p):
    k = self.blocks
    a, b = (p[name].astype(x.dtype) for name in "ab")
    z = jnp.einsum("...ni,nir->...nr", x.reshape(*x.shape[:-1], k, -1), a)
    # Part j of every input block's rank goes to output block j.
    z = z.reshape(*z.shape[:-1], k, -1).swapaxes(-3, -2)
    z = z.reshape(*z.shape[:-2], -1)
    y = jnp.einsum("...jr,jro->...jo", z, b)
    return self.alpha / self.rank * y.reshape(*y.shape[:-2], -1)

  def axes(self, names):
    return dict.fromkeys("ab", (None, None, None))

  def idle(self, p):
    return not (p["a"].any() and p["b"].any())

  def to_peft(self, p, place):
    return {"gralora_A": p["a"], "gralora_B": p["b"]}

  def from_peft(self, tensors, place, w):
    return {"a": tensors["gralora_A"], "b": tensors["gralora_B"]}, {}

  def peft_fields(self, methods):
    return dict(
      r=self.rank,
      alpha=self.alpha,
      gralora_k=self.blocks,
      gralora_dropout=self.dropout,
      hybrid_r=0,
      fan_in_fan_out=False,
    )

  @classmethod
  def from_fields(cls, fields):
    if fields.get("hybrid_r"):
      raise fields.wrong("hybrid_r", "0: a hybrid with LoRA is not supported")
    return cls(
      rank=fields.integer("r"),
      alpha=fields.number("alpha"),
      blocks=fields.integer("gralora_k"),
      dropout=fields.rate("gralora_dropout"),
    )
