"""LoRA with one factor fixed."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from research.lora.diagnosis import spectrum
from research.lora.low_rank import low_rank_after
from research.lora.method import contracts_output, dense_fp32, zeros
from research.lora.methods.lora import LoRA
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRA):
  """Zhang et al. 2023 (arXiv:2308.03303): a stays as it was drawn.

  For the authors' preconditioned update of b see `optim.riemannian`.
  Where b comes last, which is everywhere but in a tied head, all that the
  backward pass keeps of an input is its product with a.
  """

  def start(self, key, place, w, seen=None):
    trained, _ = super().start(key, place, w)
    return {"b": trained["b"]}, {"a": trained["a"]}

  def from_peft(self, tensors, place, w):
    trained, _ = super().from_peft(tensors, place, w)
    return {"b": trained["b"]}, {"a": trained["a"]}

  PEFT: ClassVar = None

  def branch(self, eq, x, p, w):
    if contracts_output(eq):
      return super().branch(eq, x, p, w)
    b = p["b"] * jnp.asarray(self.scale, p["b"].dtype)
    return low_rank_after(x, p["a"], b)

  def exported(self, p):
    return self.plain(), p


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiCA(LoRA):
  """Only a is trained; b is what the weight's output uses least: the left
  singular vectors (of PEFT's `[out, in]`) of the smallest singular values.
  """

  PEFT: ClassVar = None

  def start(self, key, place, w, seen=None):
    if place.embedding:
      raise UserError("MiCA: no start for embeddings")
    _, _, v = spectrum.smallest(dense_fp32(w), self.rank)
    return {"a": zeros(self.rank, place.size_in)}, {"b": v}

  def exported(self, p):
    return self.plain(), p
