"""DoRA: a trained magnitude per output, and LoRA for the direction.

Liu et al. 2024 (arXiv:2402.09353), equations 5 and 11: the adapted matrix is
`g (w + s aᵀb)` with `g = m / |w + s aᵀb|`. The norm is per output (a row of
PEFT's `[out, in]`) and constant in the backward pass.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from research import weights
from research.lora.method import contracts_output, dense_fp32
from research.lora.methods.lora import LoRA


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
  """LoRA with trained magnitudes `m [out]`, initialised to the norms of w."""

  PEFT_FLAG: ClassVar = "use_dora"

  def init_arrays(self, key, spec, w, stats=None):
    trained, fixed = super().init_arrays(key, spec, w)
    return trained | {"m": self._norm(trained, w)}, fixed

  def _norm(self, p, w, each=lambda f: f):
    """Returns the norm of each output of `w + s aᵀb`, fp32.

    Computed from the current base, which may be trained, merged into or
    adapted itself.

    Args:
      each: maps a function of (p, w) over leading axes, such as `jax.vmap`.
    """
    # Constant in the backward pass, and without dropout in an adapted base.
    p, w = jax.lax.stop_gradient((p, weights.bind({"w": w})["w"]))
    expanded, safe = each(self._expanded)(p, w)
    # One `cond` for all outputs: a choice per output would compute both.
    square = jax.lax.cond(
      safe.all(), lambda: expanded, lambda: each(self._direct)(p, w)
    )
    return jnp.sqrt(square)

  def _expanded(self, p, w):
    """Returns squared norms, and where they are accurate.

    Expands the square, which forms no matrix: mixed terms need `a w [r, out]`
    only. Cancellation between the terms loses precision, possibly all of it
    (fp32 then gives a square below 0). A result of at least a quarter of the
    terms loses at most two bits and counts as accurate.
    """
    a, b = dense_fp32(p["a"]), dense_fp32(p["b"])
    base = jnp.sum(jnp.square(dense_fp32(w)), 0)
    # An op on inputs, such as rounding, is no part of the weight's norm.
    alone = w if weights.unwrap(w) is None else dense_fp32(w)
    mixed = jnp.sum(weights.einsum("...i,io->...o", a, alone) * b, 0)
    squared_update = jnp.einsum("ro,rq,qo->o", b, a @ a.T, b)
    terms = base + self.scale**2 * squared_update
    square = terms + 2 * self.scale * mixed
    return square, square >= 0.25 * terms

  def _direct(self, p, w):
    """Returns squared norms from the matrix `w + s aᵀb` itself."""
    return jnp.sum(jnp.square(dense_fp32(w) + super().delta(p, w)), 0)

  def _gain(self, p, w, each=lambda f: f):
    norm = self._norm(p, w, each)
    # An all-zero output is 0 for any gain; a gain of 1 gives it gradients.
    some = norm > 0
    return jnp.where(some, dense_fp32(p["m"]) / jnp.where(some, norm, 1), 1)

  def delta(self, p, w):
    g = self._gain(p, w)
    return (g - 1) * dense_fp32(w) + g * super().delta(p, w)

  def einsum(self, eq, x, dropped, p, w):
    g = self._gain(p, w)
    if contracts_output(eq):
      scaled = (x * g).astype(x.dtype)
      y = weights.einsum(eq, scaled, w)
      if dropped is x:
        return y + super().branch(eq, scaled, p, w)
      # Dropout also acts on the base's term (g - 1) w, as in PEFT.
      y = y + weights.einsum(eq, ((dropped - x) * (g - 1)).astype(x.dtype), w)
      return y + super().branch(eq, (dropped * g).astype(x.dtype), p, w)
    base = weights.einsum(eq, x, w)
    added = super().branch(eq, dropped, p, w)
    if dropped is x:
      return (checkpoint_name(base + added, "unscaled") * g).astype(x.dtype)
    from_dropped = weights.einsum(eq, dropped, w)
    return (base + (g - 1) * from_dropped + g * added).astype(x.dtype)

  def rows(self, ids, p, w):
    g = self._gain(p, w)
    return (g - 1) * weights.take(w, ids) + g * super().rows(ids, p, w)

  def ragged(self, x, p, w, sizes):
    g = self._gain(p, w, jax.vmap)  # [E, out]
    of_row = jnp.repeat(g, sizes, axis=0, total_repeat_length=x.shape[0])
    base = weights.ragged_dot(x, w, sizes)
    y = (of_row - 1) * base + of_row * super().ragged(x, p, w, sizes)
    return y.astype(x.dtype)

  def axes(self, names):
    vector = (names[1],)
    # Older checkpoints have `square`, the squared norms of the base.
    return super().axes(names) | {"m": vector, "square": vector}

  def is_noop(self, p):
    return False

  def to_peft(self, p, spec):
    return super().to_peft(p, spec) | {"lora_magnitude_vector": p["m"]}

  def from_peft(self, tensors, spec, w):
    trained, fixed = super().from_peft(tensors, spec, w)
    return trained | {"m": tensors["lora_magnitude_vector"]}, fixed

  def peft_fields(self, methods):
    return super().peft_fields(methods) | dict(use_dora=True)
