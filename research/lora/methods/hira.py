"""HiRA: the base times a low-rank matrix, entry by entry.

Huang et al. 2025 (ICLR), equation 4: `w (1 + aᵀb)`, so the update may have
full rank; zeros of the base stay zero.
"""

import dataclasses
from typing import ClassVar

from research.lora.method import DenseDelta, dense_fp32, uniform, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiRA(DenseDelta):
  """`a [r, in]`, `b [r, out]`; no scale. Forms `aᵀb` in every step."""

  rank: int = 32

  PEFT: ClassVar = "HIRA"
  VARIES: ClassVar = ("alpha",)
  # PEFT has the field and takes r for every module.
  PEFT_HARMLESS: ClassVar = ("rank_pattern",)
  PEFT_DEFAULTS: ClassVar = dict(r=32, hira_dropout=0.0)

  def start(self, key, place, w, seen=None):
    a = uniform(key, (self.rank, place.size_in), place.size_in**-0.5)
    return {"a": a, "b": zeros(self.rank, place.size_out)}, {}

  def delta(self, p, w):
    return dense_fp32(w) * (dense_fp32(p["a"]).T @ dense_fp32(p["b"]))

  def axes(self, names):
    return {"a": (None, names[0]), "b": (None, names[1])}

  def idle(self, p):
    return not (p["a"].any() and p["b"].any())

  def to_peft(self, p, place):
    return {"hira_A": p["a"], "hira_B": p["b"].T}

  def from_peft(self, tensors, place, w):
    return {"a": tensors["hira_A"], "b": tensors["hira_B"].T}, {}

  def peft_fields(self, methods):
    return dict(r=self.rank, hira_dropout=self.dropout, fan_in_fan_out=False)

  @classmethod
  def from_fields(cls, fields):
    return cls(rank=fields.integer("r"), dropout=fields.rate("hira_dropout"))
