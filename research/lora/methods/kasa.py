"""KaSA: LoRA with singular values of its own, over a base without its smallest.

Wang et al. 2024 (arXiv:2412.06071), equations 6 to 8.
"""

import dataclasses
from typing import ClassVar

import jax

from research import weights
from research.lora.diagnosis import spectrum
from research.lora.low_rank import low_rank
from research.lora.method import Method, contracts_output, dense_fp32, normal
from research.lora.methods.lora import LoRA
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class KaSA(LoRA):
  """`w - a0ᵀb0 + s aᵀ diag(d) b`, with a0, b0 the smallest r singular triples.

  The base stays what it is; what the authors take out of it is subtracted
  where the adapter is applied. So a fresh adapter is not its base.

  Attributes:
    beta, gamma: of the authors' regularisation, for PEFT's file.
  """

  beta: float = 1e-4
  gamma: float = 1e-3

  PEFT_FLAG: ClassVar = "kasa_config"

  @property
  def pair_scale(self):
    return None  # of each term, d times that

  @property
  def starts_as_base(self):
    return False  # which loses its smallest singular values

  def start(self, key, place, w, seen=None):
    if place.embedding:
      raise UserError("KaSA: no start for embeddings")
    trained, _ = super().start(key, place, w)
    d = normal(jax.random.fold_in(key, 1), (self.rank,))
    return trained | {"d": d}, self._dropped(w)

  def _dropped(self, w):
    if self.rank >= min(w.shape):
      raise UserError(
        f"KaSA: rank is {self.rank}, expected less than {min(w.shape)}, a "
        "side of the matrix"
      )
    u, s, v = spectrum.smallest(dense_fp32(w), self.rank)
    return {"a0": (u * s).T, "b0": v}

  def _terms(self, p):
    """Returns two pairs of factors: of what is added, and taken away."""
    scaled = p["b"] * (self.scale * p["d"])[..., None]
    return (p["a"], scaled), (p["a0"], p["b0"])

  def delta(self, p, w):
    (a, b), (a0, b0) = self._terms(p)
    return dense_fp32(a).T @ dense_fp32(b) - dense_fp32(a0).T @ dense_fp32(b0)

  def einsum(self, eq, x, dropped, p, w):
    (a, b), (a0, b0) = self._terms(p)
    if contracts_output(eq):
      a, b, a0, b0 = b, a, b0, a0
    base = weights.einsum(eq, x, w) - low_rank(x, a0, b0)
    return base + low_rank(dropped, a, b)

  rows, ragged = Method.rows, Method.ragged

  def axes(self, names):
    cut = super().axes(names)
    return cut | {"a0": cut["a"], "b0": cut["b"], "d": (None,)}

  def to_peft(self, p, place):
    return super().to_peft(p, place) | {"lora_diag": p["d"]}

  def from_peft(self, tensors, place, w):
    trained, _ = super().from_peft(tensors, place, w)
    return trained | {"d": tensors["lora_diag"]}, self._dropped(w)

  def idle(self, p):
    return False

  def peft_fields(self, methods):
    own = dict(beta=self.beta, gamma=self.gamma)
    return super().peft_fields(methods) | dict(kasa_config=own)

  @classmethod
  def from_fields(cls, fields):
    own = dataclasses.replace(
      fields.object("kasa_config"), defaults=dict(beta=1e-4, gamma=1e-3)
    )
    plain = LoRA.from_fields(fields)
    return cls(
      **vars(plain), beta=own.number("beta"), gamma=own.number("gamma")
    )
