"""PiSSA, MiLoRA, OLoRA, CorDA, LoRA-GA: LoRA with factors from the weight.

The factors are initialised from a decomposition of the weight or its gradient.
The authors subtract the initial product `s a0ᵀb0` from the base. Here the base
is unchanged, so that adapters can share it and it can be packed, and the
adapter subtracts the product:

  w + s (aᵀb - a0ᵀb0)

This is the same function with a branch of rank 2r. It is exported as LoRA of
twice the rank, so loading needs no decomposition of the base.
"""

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from research.lora.diagnosis import spectrum
from research.lora.method import dense_fp32
from research.lora.methods.lora import LoRA
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecompositionInit(LoRA):
  """Base class: a subclass's `factors` computes the initial a and b."""

  PEFT: ClassVar = None

  def factors(self, w, stats):
    """Returns the initial (a [r, in], b [r, out]).

    Args:
      w: `[in, out]`, fp32.
      stats: calibration statistics of the matrix, or None.
    """
    raise NotImplementedError

  def init_arrays(self, key, spec, w, stats=None):
    if spec.embedding:
      raise UserError(
        f"{type(self).__name__}: found an embedding, expected a linear layer"
      )
    if self.rank > min(spec.size_in, spec.size_out):
      raise UserError(
        f"{type(self).__name__}: rank is {self.rank}, expected at most "
        f"{min(spec.size_in, spec.size_out)}, a side of the matrix"
      )
    a, b = self.factors(dense_fp32(w), stats)
    return {"a": a, "b": b}, {"a0": a, "b0": b}

  def delta(self, p, w):
    return super().delta(p, w) - super().delta(_initial_factors(p), w)

  def branch(self, eq, x, p, w):
    y = super().branch(eq, x, p, w)
    return y - super().branch(eq, x, _initial_factors(p), w)

  def rows(self, ids, p, w):
    return super().rows(ids, p, w) - super().rows(ids, _initial_factors(p), w)

  def ragged(self, x, p, w, sizes):
    y = super().ragged(x, p, w, sizes)
    return y - super().ragged(x, _initial_factors(p), w, sizes)

  def axes(self, names):
    cut = super().axes(names)
    return cut | {"a0": cut["a"], "b0": cut["b"]}

  def exported(self, p):
    # alpha / r, or alpha / sqrt(r), stays what it is.
    alpha = self.alpha * (2**0.5 if self.rslora else 2)
    plain = dataclasses.replace(self.as_lora(), rank=2 * self.rank, alpha=alpha)
    a = jnp.concatenate([p["a"], p["a0"]], -2)
    b = jnp.concatenate([p["b"], -p["b0"]], -2)
    return plain, {"a": a, "b": b}


def _initial_factors(p):
  return {"a": p["a0"], "b": p["b0"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PiSSA(DecompositionInit):
  """PiSSA: the largest singular triples (Meng et al. 2024, arXiv:2404.02948).

  Attributes:
    part: which triples; MiLoRA (Wang et al. 2024, arXiv:2406.09044) uses the
      smallest.
  """

  part: Literal["largest", "smallest"] = "largest"

  def factors(self, w, stats):
    find = {"largest": spectrum.largest, "smallest": spectrum.smallest}
    u, s, v = find[self.part](w, self.rank)
    root = jnp.sqrt(s / self.scale)[:, None]
    return root * u.T, root * v


@dataclasses.dataclass(frozen=True, kw_only=True)
class OLoRA(DecompositionInit):
  """OLoRA: the first columns of QR (Buyukakyuz 2024, arXiv:2406.01775)."""

  def factors(self, w, stats):
    q, r = jnp.linalg.qr(w.T)  # of PEFT's [out, in]
    return r[: self.rank], q[:, : self.rank].T


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorDA(DecompositionInit):
  """CorDA: singular triples of `C w`, with the inputs' covariance C.

  Yang et al. 2024 (arXiv:2406.05223). `stats` is the covariance `[in, in]`.

  Attributes:
    keep: 'knowledge' (KPM) trains the smallest triples, 'instruction' (IPM)
      the largest.
    damping: share of the covariance's mean diagonal that is added to the
      diagonal. PEFT doubles it until the inverse is accurate; this needs no
      inverse.
  """

  keep: Literal["instruction", "knowledge"] = "instruction"
  damping: float = 0.01

  def factors(self, w, stats):
    if stats is None:
      raise UserError(
        "CorDA: needs the inputs' covariances; give Adapt.init_stats"
      )
    mean = jnp.trace(stats) / len(stats)
    # A matrix without inputs (an expert, say) uses the identity.
    mean = jnp.where(mean > 0, mean, 1)
    c = stats + self.damping * mean * jnp.eye(len(stats))
    # PEFT computes svd(W C) with W [out, in]; this is its transpose, C w.
    product = _dot(c, w)
    find = {"instruction": spectrum.largest, "knowledge": spectrum.smallest}
    _, s, v = find[self.keep](product, self.rank)
    # C⁻¹ u s = w vᵀ avoids the inverse.
    least = jnp.finfo(s.dtype).eps * jnp.linalg.norm(product)
    root = jnp.sqrt(jnp.maximum(s, least) / self.scale)[:, None]
    return _dot(v, w.T) / (root * self.scale), root * v


_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAGA(DecompositionInit):
  """LoRA-GA: singular vectors of the gradient (arXiv:2407.05000).

  Wang et al. 2024. `stats` is the mean gradient `[in, out]` of the base weight.
  a is the first r singular vectors of the input side, b the next r of the
  output side.

  Attributes:
    gamma: stable scaling: multiplies both by `out^(1/4) / sqrt(gamma)`.
    form: 'paper' scales both orthonormal factors; 'peft' leaves a orthonormal
      and multiplies b by the gradient's singular values and the scaling.
  """

  gamma: float = 16.0
  form: Literal["paper", "peft"] = "paper"

  def factors(self, w, stats):
    if stats is None:
      raise UserError(
        "LoRAGA: needs the weights' gradients; give Adapt.init_stats"
      )
    r = self.rank
    if 2 * r > min(w.shape):
      raise UserError(
        f"LoRAGA: rank is {r}, expected at most {min(w.shape) // 2}, half a "
        "side of the matrix"
      )
    u, s, v = spectrum.largest(dense_fp32(stats), 2 * r)
    a, b = u.T[:r], v[r:]
    stable = w.shape[1] ** 0.25 / self.gamma**0.5
    if self.form == "peft":
      return a, stable * s[r:, None] * b
    return stable * a, stable * b
