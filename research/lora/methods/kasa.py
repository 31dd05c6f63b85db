"""KaSA: LoRA with trained singular values; removes the base's smallest ones.

Wang et al. 2024 (arXiv:2412.06071), equations 6 to 8.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from research import weights
from research.lora.diagnosis import spectrum
from research.lora.low_rank import low_rank, orthonormal_distance
from research.lora.method import Method, contracts_output, dense_fp32, normal
from research.lora.methods.lora import LoRA
from research.typing import Array, Params, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class KaSA(LoRA):
  """`w - a0ᵀb0 + s aᵀ diag(d) b`, with a0, b0 the smallest r singular triples.

  The authors remove the smallest triples from the base; here the base is
  unchanged and the adapter subtracts them. A new adapter therefore changes the
  model's outputs.

  Attributes:
    beta, gamma: weights of the authors' regularisation, stored in PEFT's file.
  """

  beta: float = 1e-4
  gamma: float = 1e-3

  PEFT_FLAG: ClassVar = "kasa_config"

  @property
  def pair_scale(self):
    return None  # each term has its own factor d

  @property
  def starts_as_base(self):
    return False  # subtracts the base's smallest singular triples

  def init_arrays(self, key, spec, w, stats=None):
    if spec.embedding:
      raise UserError("KaSA: found an embedding, expected a linear layer")
    trained, _ = super().init_arrays(key, spec, w)
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

  def to_peft(self, p, spec):
    return super().to_peft(p, spec) | {"lora_diag": p["d"]}

  def from_peft(self, tensors, spec, w):
    trained, _ = super().from_peft(tensors, spec, w)
    return trained | {"d": tensors["lora_diag"]}, self._dropped(w)

  def is_noop(self, p):
    return False

  def peft_fields(self, methods):
    kasa_fields = dict(beta=self.beta, gamma=self.gamma)
    return super().peft_fields(methods) | dict(kasa_config=kasa_fields)

  @classmethod
  def from_fields(cls, fields):
    config = dataclasses.replace(
      fields.object("kasa_config"), defaults=dict(beta=1e-4, gamma=1e-3)
    )
    plain = LoRA.from_fields(fields)
    return cls(
      **vars(plain), beta=config.number("beta"), gamma=config.number("gamma")
    )


def penalty(params: Params) -> Array:
  """Returns `Σ β ‖d‖² + γ (‖a aᵀ - 1‖ + ‖b bᵀ - 1‖)` over matrices.

  arXiv:2412.06071, equations 9 to 12, as PEFT sums them; a term for
  `allocate.Orthogonal`.

  Raises:
    UserError: no KaSA adapter among the parameters.
  """
  leaves = jax.tree.leaves(params, is_leaf=weights.is_weight)
  adapters = [x for x in leaves if isinstance(getattr(x, "method", None), KaSA)]
  if not adapters:
    raise UserError("kasa.penalty: no KaSA adapter among the parameters")
  total = jnp.zeros((), jnp.float32)
  for leaf in adapters:
    a, b, d = (leaf.trained[name] for name in "abd")
    total += leaf.method.beta * jnp.sum(jnp.square(d))
    for x in (a, b):
      total += leaf.method.gamma * jnp.sum(orthonormal_distance(x))
  return total
