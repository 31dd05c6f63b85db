"""MiSS: one small trained matrix, shared by all groups of `r` inputs.

Kang and Yin 2024 (arXiv:2409.15371): every group of r inputs has the same
update, which equals LoRA with a fixed 0/1 factor.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from research.lora.method import Method, contracts_output, dense_fp32, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiSS(Method):
  """Row i of the update is row `i mod r` of `d [r, out]`; no scale."""

  rank: int = 64

  PEFT: ClassVar = "MISS"
  PER_MODULE: ClassVar = ("alpha",)
  PEFT_IGNORED: ClassVar = ("mini_r",)
  PEFT_DEFAULTS: ClassVar = dict(r=64, miss_dropout=0.0)

  def init_arrays(self, key, spec, w, stats=None):
    return {"d": zeros(self.rank, spec.size_out)}, {}

  def delta(self, p, w):
    n = w.shape[-2]
    return jnp.tile(dense_fp32(p["d"]), (-(-n // self.rank), 1))[:n]

  def branch(self, eq, x, p, w):
    if contracts_output(eq):
      return super().branch(eq, x, p, w)
    pad = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % self.rank)]
    x = jnp.pad(x, pad).reshape(*x.shape[:-1], -1, self.rank)
    return jnp.sum(x, -2) @ p["d"].astype(x.dtype)

  def axes(self, names):
    return {"d": (None, names[1])}

  def is_noop(self, p):
    return not p["d"].any()

  def to_peft(self, p, spec):
    return {"miss_block": p["d"]}

  def from_peft(self, tensors, spec, w):
    return {"d": tensors["miss_block"]}, {}

  def peft_fields(self, methods):
    return dict(r=self.rank, miss_dropout=self.dropout, init_weights=True)

  @classmethod
  def from_fields(cls, fields):
    if fields.get("init_weights") not in (None, True, False):
      raise fields.wrong("init_weights", "true: 'bat' and 'mini' are others")
    return cls(rank=fields.integer("r"), dropout=fields.rate("miss_dropout"))
