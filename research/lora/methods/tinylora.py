"""TinyLoRA: a few numbers mix what stands between two factors of the weight.

Morris et al. 2026 (arXiv:2602.04118). With `w = U S V` cut to rank r, in our
`[in, out]`: `a = (U S^½)ᵀ`, `b = S^½ V`, and what is added is
`aᵀ (sum_i v_i P_i)ᵀ b`. Only `v` is trained.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from research.lora.diagnosis import spectrum
from research.lora.low_rank import low_rank
from research.lora.method import (
  Method,
  contracts_output,
  dense_fp32,
  normal,
  zeros,
)
from research.typing import UserError

_ORDER = (
  *("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj"),
  *("gate_proj", "up_proj", "down_proj", "lm_head"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyLoRA(Method):
  """`v [size]` is trained; `a [r, in]`, `b [r, out]`, `p [size, r, r]` fixed.

  Every matrix has a vector of its own: PEFT's `weight_tying=0`.

  Attributes:
    size: how many numbers a matrix trains, PEFT's `u`.
    index: of the matrix among those adapted, as PEFT counts them, which names
      its vector in a file; set by `among`.
  """

  rank: int = 2
  size: int = 64
  index: int = 0

  PEFT: ClassVar = "TINYLORA"
  VARIES: ClassVar = ("alpha", "index")
  PEFT_DEFAULTS: ClassVar = dict(
    r=2, u=64, tinylora_dropout=0.0, weight_tying=0.0, save_projection=True
  )
  PEFT_HARMLESS: ClassVar = ("projection_seed", "init_v_bound")

  @property
  def PEFT_SHARED(self) -> tuple[str, ...]:
    """The vector's name; a file holds it outside of its module."""
    return (f"tinylora_v.{self.index}",)

  def among(self, name, names):
    index = sorted(names, key=_place).index(name)
    return dataclasses.replace(self, index=index)

  def settled(self):
    return dataclasses.replace(self, index=0)

  def start(self, key, place, w, seen=None):
    least = min(place.size_in, place.size_out)
    if place.embedding or self.rank > least:
      what = "an embedding" if place.embedding else f"rank {self.rank}"
      raise UserError(
        f"TinyLoRA: found {what}, expected a linear layer and at most rank "
        f"{least}, a side of the matrix"
      )
    u, s, v = spectrum.largest(dense_fp32(w), self.rank)
    root = jnp.sqrt(s)[:, None]
    p = normal(key, (self.size, self.rank, self.rank), self.rank**-0.5)
    return {"v": zeros(self.size)}, {"a": root * u.T, "b": root * v, "p": p}

  def _mixed(self, p):
    """Returns b after the mixture."""
    mixture = jnp.tensordot(dense_fp32(p["v"]), dense_fp32(p["p"]), 1)
    return mixture.T @ dense_fp32(p["b"])

  def delta(self, p, w):
    return dense_fp32(p["a"]).T @ self._mixed(p)

  def branch(self, eq, x, p, w):
    a, b = p["a"], self._mixed(p)
    return low_rank(x, b, a) if contracts_output(eq) else low_rank(x, a, b)

  def rows(self, ids, p, w):
    return jnp.einsum("r...,rd->...d", p["a"][:, ids], self._mixed(p))

  def axes(self, names):
    cut = {"a": (None, names[0]), "b": (None, names[1])}
    return {"v": (None,), "p": (None,) * 3} | cut

  def idle(self, p):
    return not p["v"].any()

  def to_peft(self, p, place):
    return {
      f"tinylora_v.{self.index}": p["v"],
      "tinylora_A": p["a"],
      "tinylora_B": p["b"].T,
      "tinylora_P": p["p"],
    }

  def from_peft(self, tensors, place, w):
    trained = {"v": tensors[f"tinylora_v.{self.index}"]}
    fixed = {
      "a": tensors["tinylora_A"],
      "b": tensors["tinylora_B"].T,
      "p": tensors["tinylora_P"],
    }
    return trained, fixed

  def peft_fields(self, methods):
    return dict(
      r=self.rank,
      u=self.size,
      tinylora_dropout=self.dropout,
      weight_tying=0.0,
      save_projection=True,
      init_weights=True,
      fan_in_fan_out=False,
    )

  @classmethod
  def from_fields(cls, fields):
    if fields.rate("weight_tying"):
      raise fields.wrong("weight_tying", "0: a vector for each matrix")
    if not fields.flag("save_projection"):
      raise fields.wrong("save_projection", "true: torch draws what is missing")
    return cls(
      rank=fields.integer("r"),
      size=fields.integer("u"),
      dropout=fields.rate("tinylora_dropout"),
    )


def _place(module):
  """Sorts modules as they stand in Hugging Face's models."""
  *parents, name = module.split(".")
  layer = next((int(part) for part in parents if part.isdigit()), -1)
  last = name == "lm_head"
  return last, layer, _ORDER.index(name) if name in _ORDER else len(_ORDER)
