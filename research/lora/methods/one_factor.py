"""LoRA with one trained and one fixed factor: LoRA-FA and MiCA."""

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
  """LoRA-FA: a stays at its random initialisation, only b is trained.

  Zhang et al. 2023 (arXiv:2308.03303). For the authors' preconditioned update
  of b see `optim.riemannian`. Where b is applied last (everywhere but in a
  tied head), the backward pass saves `x aᵀ` instead of the input x.
  """

  def init_arrays(self, key, spec, w, stats=None):
    if spec.embedding:  # whose a is 0, and would stay 0
      raise UserError("LoRAFA: found an embedding, expected a linear layer")
    trained, _ = super().init_arrays(key, spec, w)
    return {"b": trained["b"]}, {"a": trained["a"]}

  def from_peft(self, tensors, spec, w):
    trained, _ = super().from_peft(tensors, spec, w)
    return {"b": trained["b"]}, {"a": trained["a"]}

  PEFT: ClassVar = None

  def branch(self, eq, x, p, w):
    if contracts_output(eq):
      return super().branch(eq, x, p, w)
    b = p["b"] * jnp.asarray(self.scale, p["b"].dtype)
    return low_rank_after(x, p["a"], b)

  def exported(self, p):
    return self.as_lora(), p


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiCA(LoRA):
  """MiCA: b is fixed to minor singular vectors of the base, a is trained.

  They are the left singular vectors (of PEFT's `[out, in]`) of the smallest
  singular values.
  """

  PEFT: ClassVar = None

  def init_arrays(self, key, spec, w, stats=None):
    if spec.embedding:
      raise UserError("MiCA: found an embedding, expected a linear layer")
    _, _, v = spectrum.smallest(dense_fp32(w), self.rank)
    return {"a": zeros(self.rank, spec.size_in)}, {"b": v}

  def exported(self, p):
    return self.as_lora(), p
