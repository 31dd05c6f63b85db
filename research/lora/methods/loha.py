"""LoHa: the elementwise (Hadamard) product of two low-rank matrices.

Hyeon-Woo et al. 2022 (FedPara, arXiv:2108.06098), proposition 2; LyCORIS. The
rank of the update is at most `r^2`.
"""

import dataclasses
from typing import ClassVar

import jax

from research.lora.method import DenseDelta, dense_fp32, uniform, zeros

NAMES = {"b1": "w1_a", "a1": "w1_b", "b2": "w2_a", "a2": "w2_b"}
"""Our names -> PEFT's; PEFT stores the b factors transposed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHa(DenseDelta):
  """`s (a1ᵀb1) * (a2ᵀb2)`, `a [r, in]`, `b [r, out]`, `s = alpha / r`."""

  alpha: float = 8.0

  PEFT: ClassVar = "LOHA"
  PEFT_PATTERNS: ClassVar = {"rank": "rank_pattern", "alpha": "alpha_pattern"}
  PEFT_DEFAULTS: ClassVar = dict(r=8, alpha=8)

  def init_arrays(self, key, spec, w, stats=None):
    r, size_in, size_out = self.rank, spec.size_in, spec.size_out
    k = [jax.random.fold_in(key, i) for i in range(3)]
    return dict(
      a1=uniform(k[0], (r, size_in), size_in**-0.5),
      b1=uniform(k[1], (r, size_out), r**-0.5),
      a2=zeros(r, size_in),
      b2=uniform(k[2], (r, size_out), r**-0.5),
    ), {}

  def delta(self, p, w):
    first = dense_fp32(p["a1"]).T @ dense_fp32(p["b1"])
    second = dense_fp32(p["a2"]).T @ dense_fp32(p["b2"])
    return self.alpha / self.rank * first * second

  def axes(self, names):
    a, b = (None, names[0]), (None, names[1])
    return dict(a1=a, b1=b, a2=a, b2=b)

  def is_noop(self, p):
    return not all(x.any() for x in p.values())

  def to_peft(self, p, spec):
    return {
      f"hada_{theirs}": p[ours].T if ours[0] == "b" else p[ours]
      for ours, theirs in NAMES.items()
    }

  def from_peft(self, tensors, spec, w):
    return {
      ours: tensors[f"hada_{theirs}"].T
      if ours[0] == "b"
      else tensors[f"hada_{theirs}"]
      for ours, theirs in NAMES.items()
    }, {}

  def peft_fields(self, methods):
    return dict(
      r=self.rank, alpha=self.alpha, rank_dropout=0.0, module_dropout=0.0
    )

  @classmethod
  def from_fields(cls, fields):
    fields.neutral(dict(rank_dropout=(None, 0), module_dropout=(None, 0)))
    return cls(rank=fields.integer("r"), alpha=fields.number("alpha"))
