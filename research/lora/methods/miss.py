"""MiSS: one small matrix shared by all groups of `r` inputs.

Kang and Yin 2024 (arXiv:2409.15371): every group of r inputs has the same
update, so the update is that of LoRA with a fixed 0/1 factor.
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
  VARIES: ClassVar = ("alpha",)
  PEFT_HARMLESS: ClassVar = ("mini_r",)
  PEFT_DEFAULTS: ClassVar = dict(r=64, miss_dropout=0.0)

  def start(self, key, place, w, seen=None):
    return {"d": zeros(self.rank, place.size_out)}, {}

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

  def idle(self, p):
    return not p["d"].any()

  def to_peft(self, p, place):
    return {"miss_block": p["d"]}

  def from_peft(self, tensors, place, w):
    return {"d": tensors["miss_block"]}, {}

  def peft_fields(self, methods):
    return dict(r=self.rank, miss_dropout=self.dropout, init_weights=True)

  @classmethod
  def from_fields(cls, fields):
    if fields.get("init_weights") not in (None, True, False):
      raise fields.wrong("init_weights", "true: 'bat' and 'mini' are others")
    return cls(rank=fields.integer("r"), dropout=fields.rate("miss_dropout"))
