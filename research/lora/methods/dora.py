"""DoRA: a trained length for each output, and LoRA for its direction.

Liu et al. 2024 (arXiv:2402.09353), equations 5 and 11: the adapted matrix is
`g (w + s aᵀb)` with `g = m / |w + s aᵀb|`, a norm for each output (a row of
PEFT's `[out, in]`), constant in the backward pass.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from research import weights
from research.lora.method import turned, wide
from research.lora.methods.lora import LoRA


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
  """LoRA under trained magnitudes `m [out]`, which start as the norms of w."""

  PEFT_FLAG: ClassVar = "use_dora"

  def start(self, key, place, w, seen=None):
    trained, _ = super().start(key, place, w)
    fixed = {"square": _square(w)}
    m = self._norm(trained | fixed, w)
    return trained | {"m": m}, fixed

  def _norm(self, p, w):
    """Returns the norm of each output of `w + s aᵀb`, fp32.

    Expanded, so that no matrix is formed: what the base adds is known, and
    mixed terms need `a w [r, out]` only.
    """
    a, b = wide(p["a"]), wide(p["b"])
    mixed = jnp.sum(weights.einsum("...i,io->...o", a, w) * b, 0)
    own = jnp.einsum("ro,rq,qo->o", b, a @ a.T, b)
    return jnp.sqrt(p["square"] + 2 * self.scale * mixed + self.scale**2 * own)

  def _gain(self, p, w):
    return p["m"] / jax.lax.stop_gradient(self._norm(p, w))

  def delta(self, p, w):
    g = self._gain(p, w)
    return (g - 1) * wide(w) + g * super().delta(p, w)

  def einsum(self, eq, x, dropped, p, w):
    g = self._gain(p, w)
    if turned(eq):
      scaled = (x * g).astype(x.dtype)
      y = weights.einsum(eq, scaled, w)
      if dropped is x:
        return y + super().branch(eq, scaled, p, w)
      # What dropout takes from the base's share, too (PEFT's rule).
      y = y + weights.einsum(eq, ((dropped - x) * (g - 1)).astype(x.dtype), w)
      return y + super().branch(eq, (dropped * g).astype(x.dtype), p, w)
    base = weights.einsum(eq, x, w)
    added = super().branch(eq, dropped, p, w)
    if dropped is x:
      return (checkpoint_name(base + added, "unscaled") * g).astype(x.dtype)
    seen = weights.einsum(eq, dropped, w)
    return (base + (g - 1) * seen + g * added).astype(x.dtype)

  def rows(self, ids, p, w):
    g = self._gain(p, w)
    return (g - 1) * weights.take(w, ids) + g * super().rows(ids, p, w)

  def ragged(self, x, p, w, sizes):
    g = jax.vmap(self._gain)(p, w)  # [E, out]
    of_row = jnp.repeat(g, sizes, axis=0, total_repeat_length=x.shape[0])
    base = weights.ragged_dot(x, w, sizes)
    return (of_row - 1) * base + of_row * super().ragged(x, p, w, sizes)

  def axes(self, names):
    vector = (names[1],)
    return super().axes(names) | {"m": vector, "square": vector}

  def idle(self, p):
    return False

  def to_peft(self, p, place):
    return super().to_peft(p, place) | {"lora_magnitude_vector": p["m"]}

  def from_peft(self, tensors, place, w):
    trained, _ = super().from_peft(tensors, place, w)
    m = tensors["lora_magnitude_vector"]
    return trained | {"m": m}, {"square": _square(w)}

  def peft_fields(self, methods):
    return super().peft_fields(methods) | dict(use_dora=True)


def _square(w):
  """Returns the squared norm of each output of `w`, fp32."""
  return jnp.sum(jnp.square(wide(w)), 0)
