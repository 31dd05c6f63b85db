"""Factors that make up for a base's rounding: LoftQ, and QPiSSA.

Li et al. 2023 (arXiv:2310.08659), algorithm 1: packed codes of what the factors
leave, then factors of what the codes leave, in turn. Meng et al. 2024
(arXiv:2404.02948), section 4: the same from the other end, the factors first,
so that codes are spent on a residual without its largest directions.

What comes out is plain LoRA, its factors away from zero, over a packed base:
`w` is about `q + s aᵀb`. With one step of LoftQ the base is what the weights
alone would be packed to; otherwise it belongs to the adapter.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from research import tree, weights
from research.lora.adapt import Adapt
from research.lora.adapted import AdaptedTensor
from research.lora.diagnosis import spectrum
from research.lora.method import dense_fp32
from research.lora.methods.lora import LoRA
from research.lora.wrap import wrap
from research.quant.format import Format
from research.quant.formats.codebook import Codebook
from research.quant.numerics import finite
from research.quant.qtensor import QTensor, pack
from research.quant.quantize import Quantize
from research.typing import Array, Float, Int, Params, PRNGKey, UserError

First = Literal["codes", "factors"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoftQ:
  """Packs weights and adapts them, each with the other in view.

  Attributes:
    quantize: how weights are packed; what it packs beyond `adapt` is packed
      alone.
    adapt: plain LoRA, and on what.
    steps: how often the weights are packed.
    first: `"codes"` for LoftQ, `"factors"` for QPiSSA.
  """

  quantize: Quantize = Quantize()
  adapt: Adapt = Adapt()
  steps: int = 1
  first: First = "codes"

  def __post_init__(self):
    if self.steps < 1:
      raise UserError(f"LoftQ: steps is {self.steps}, expected at least 1")
    if type(self.adapt.method) is not LoRA:
      name = type(self.adapt.method).__name__
      raise UserError(f"LoftQ: adapt.method is {name}, expected LoRA")

  def __call__(self, params: Params, key: PRNGKey | None = None) -> Any:
    """Returns `params`, packed and adapted; draws nothing."""
    del key
    how = self.quantize

    def make(paths, method, w):
      rank, size = method.rank, min(w.shape[-2:])
      if rank > size:
        raise UserError(
          f"LoftQ: rank is {rank}, expected at most {size}, a side of "
          f"{paths[0]}"
        )
      if not weights.is_weight(w):
        finite.check(w, paths[0])
      q, a, b = _fitted(
        w,
        rank=rank,
        scale=method.scale,
        steps=self.steps,
        first=self.first,
        format=how.format,
      )
      return {"a": a, "b": b}, {"packed": q}

    adapted = wrap(params, self.adapt.methods(params), make)

    def settle(path, w):
      if isinstance(w, AdaptedTensor):
        return dataclasses.replace(w, w=w.fixed["packed"], fixed={})
      return how.pack(w) if path in chosen else w

    chosen = set(how.chosen(adapted))
    return tree.map_paths(settle, adapted, is_leaf=weights.is_weight)


@functools.partial(
  jax.jit, static_argnames=("rank", "scale", "steps", "first", "format")
)
def _fitted(w, *, rank, scale, steps, first, format):
  """Returns (packed, a, b) of a stack of matrices, one at a time."""
  lead = w.shape[:-2]
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(lead) :]), w)

  def one(w):
    return fit(weights.dense(w), rank, scale, steps, first, format)

  found = jax.lax.map(one, flat)
  return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


def fit(
  w: Float[Array, "I O"],
  rank: int,
  scale: float,
  steps: int | Int[Array, ""] = 1,
  first: First = "codes",
  format: Format = Codebook(),
) -> tuple[QTensor, Float[Array, "R I"], Float[Array, "R O"]]:
  """Returns (q, a, b) with `q + scale aᵀb` about `w`.

  Args:
    w: any floating point; q decodes to its dtype.
    rank: of the factors.
    scale: of the adapter; the factors are made for it.
    steps: how often q is packed.
    first: what is found first, see `LoftQ`.
    format: that q is packed in.
  """
  full = dense_fp32(w)
  a = jnp.zeros((rank, w.shape[0]), jnp.float32)
  b = jnp.zeros((rank, w.shape[1]), jnp.float32)
  if first == "factors":
    a, b = _factors(full, rank, scale)

  def packed(factors):
    a, b = factors
    return pack((full - scale * (a.T @ b)).astype(w.dtype), format)

  def again(_, factors):
    return _factors(full - dense_fp32(packed(factors)), rank, scale)

  a, b = jax.lax.fori_loop(0, steps - 1, again, (a, b))
  q = packed((a, b))
  if first == "codes":
    a, b = _factors(full - dense_fp32(q), rank, scale)
  return q, a, b


def _factors(rest, rank, scale):
  u, s, v = spectrum.largest(rest, rank)
  root = jnp.sqrt(s / scale)[:, None]
  return root * u.T, root * v
