"""LoRA that starts from the weight, or its gradient, and not from zero.

Their authors put the start `s a0ᵀb0` into the adapter and take it out of the
base. Here the base stays what it is, shared by all adapters and packed if need
be, and the start is subtracted where the adapter is applied:

  w + s (aᵀb - a0ᵀb0)

which is the same function and a branch of rank 2r; exported, it is LoRA of
twice the rank, so that nobody decomposes a base again.
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
class Residual(LoRA):
  """Common to all: what they start from is theirs (`factors`)."""

  PEFT: ClassVar = None

  def factors(self, w, seen):
    """Returns (a [r, in], b [r, out]) to start from.

    Args:
      w: `[in, out]`, fp32.
      seen: what was measured.
    """
    raise NotImplementedError

  def start(self, key, place, w, seen=None):
    if place.embedding:
      raise UserError(f"{type(self).__name__}: no start for embeddings")
    if self.rank > min(place.size_in, place.size_out):
      raise UserError(
        f"{type(self).__name__}: rank is {self.rank}, expected at most "
        f"{min(place.size_in, place.size_out)}, a side of the matrix"
      )
    a, b = self.factors(dense_fp32(w), seen)
    return {"a": a, "b": b}, {"a0": a, "b0": b}

  def delta(self, p, w):
    return super().delta(p, w) - super().delta(_start(p), w)

  def branch(self, eq, x, p, w):
    y = super().branch(eq, x, p, w)
    return y - super().branch(eq, x, _start(p), w)

  def rows(self, ids, p, w):
    return super().rows(ids, p, w) - super().rows(ids, _start(p), w)

  def ragged(self, x, p, w, sizes):
    y = super().ragged(x, p, w, sizes)
    return y - super().ragged(x, _start(p), w, sizes)

  def axes(self, names):
    cut = super().axes(names)
    return cut | {"a0": cut["a"], "b0": cut["b"]}

  def exported(self, p):
    # alpha / r, or alpha / sqrt(r), stays what it is.
    alpha = self.alpha * (2**0.5 if self.rslora else 2)
    plain = dataclasses.replace(self.plain(), rank=2 * self.rank, alpha=alpha)
    a = jnp.concatenate([p["a"], p["a0"]], -2)
    b = jnp.concatenate([p["b"], -p["b0"]], -2)
    return plain, {"a": a, "b": b}


def _start(p):
  return {"a": p["a0"], "b": p["b0"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PiSSA(Residual):
  """Meng et al. 2024 (arXiv:2404.02948): the largest singular triples.

  Attributes:
    part: which; MiLoRA (Wang et al. 2024, arXiv:2406.09044) takes the
      smallest.
  """

  part: Literal["largest", "smallest"] = "largest"

  def factors(self, w, seen):
    find = {"largest": spectrum.largest, "smallest": spectrum.smallest}
    u, s, v = find[self.part](w, self.rank)
    root = jnp.sqrt(s / self.scale)[:, None]
    return root * u.T, root * v


@dataclasses.dataclass(frozen=True, kw_only=True)
class OLoRA(Residual):
  """Buyukakyuz 2024 (arXiv:2406.01775): the first columns of QR."""

  def factors(self, w, seen):
    q, r = jnp.linalg.qr(w.T)  # of PEFT's [out, in]
    return r[: self.rank], q[:, : self.rank].T


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorDA(Residual):
  """Yang et al. 2024 (arXiv:2406.05223): triples of `w` seen by its inputs.

  `seen` is the inputs' covariance `[in, in]`.

  Attributes:
    keep: 'knowledge' trains what the inputs use least (KPM), 'instruction'
      what they use most (IPM).
    damping: added to the covariance's diagonal, in its mean. PEFT doubles it
      until its inverse is one; here there is none.
  """

  keep: Literal["instruction", "knowledge"] = "instruction"
  damping: float = 0.01

  def factors(self, w, seen):
    if seen is None:
      raise UserError("CorDA: needs the inputs' covariances; give Adapt.look")
    mean = jnp.trace(seen) / len(seen)
    # What has seen nothing (an expert, say) has no preference.
    mean = jnp.where(mean > 0, mean, 1)
    c = seen + self.damping * mean * jnp.eye(len(seen))
    # As PEFT: svd(W C) with W [out, in]; here of the transpose, C w.
    product = _dot(c, w)
    find = {"instruction": spectrum.largest, "knowledge": spectrum.smallest}
    _, s, v = find[self.keep](product, self.rank)
    # C⁻¹ u s = w vᵀ, so that nothing is inverted.
    least = jnp.finfo(s.dtype).eps * jnp.linalg.norm(product)
    root = jnp.sqrt(jnp.maximum(s, least) / self.scale)[:, None]
    return _dot(v, w.T) / (root * self.scale), root * v


_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAGA(Residual):
  """Wang et al. 2024 (arXiv:2407.05000): the gradient's singular vectors.

  `seen` is the mean gradient `[in, out]` of the base weight. a takes the first
  r directions of the input side, b the next r of the output side.

  Attributes:
    gamma: stable scaling: both times `out^(1/4) / sqrt(gamma)`.
    form: 'paper', both orthogonal; 'peft' leaves a orthonormal and gives b
      the gradient's singular values and the factor.
  """

  gamma: float = 16.0
  form: Literal["paper", "peft"] = "paper"

  def factors(self, w, seen):
    if seen is None:
      raise UserError("LoRAGA: needs the weights' gradients; give Adapt.look")
    r = self.rank
    if 2 * r > min(w.shape):
      raise UserError(
        f"LoRAGA: rank is {r}, expected at most {min(w.shape) // 2}, half a "
        "side of the matrix"
      )
    u, s, v = spectrum.largest(dense_fp32(seen), 2 * r)
    a, b = u.T[:r], v[r:]
    stable = w.shape[1] ** 0.25 / self.gamma**0.5
    if self.form == "peft":
      return a, stable * s[r:, None] * b
    return stable * a, stable * b
