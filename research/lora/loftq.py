"""LoftQ and QPiSSA: LoRA initialised to compensate the base's quantization.

Li et al. 2023 (arXiv:2310.08659), algorithm 1: alternately quantizes the
residual of the factors and fits the factors to the residual of the codes. Meng
et al. 2024 (arXiv:2404.02948), section 4 (QPiSSA): the same, but fits the
factors first, so that codes encode a residual without its largest singular
directions.

The result is plain LoRA with nonzero factors over a packed base: `w` is about
`q + s aᵀb`. With one step of LoftQ the base equals the packed weights alone and
may serve other adapters; otherwise it fits this adapter only.
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
from research.ranges import PositiveInt, Ranged
from research.typing import Array, Float, Int, Params, PRNGKey, UserError

First = Literal["codes", "factors"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoftQ(Ranged):
  """Transform that packs weights and adds LoRA fitted to the rounding error.

  Attributes:
    quantize: the format; targets outside those of `adapt` are packed without
      an adapter.
    adapt: plain LoRA and its targets.
    steps: number of alternations, each packing the weights once.
    first: `"codes"` for LoftQ, `"factors"` for QPiSSA.
  """

  quantize: Quantize = Quantize()
  adapt: Adapt = Adapt()
  steps: PositiveInt = 1
  first: First = "codes"

  def __post_init__(self):
    super().__post_init__()
    if type(self.adapt.method) is not LoRA:
      name = type(self.adapt.method).__name__
      raise UserError(f"LoftQ: adapt.method is {name}, expected LoRA")

  def __call__(self, params: Params, key: PRNGKey | None = None) -> Any:
    """Returns `params`, packed and adapted; does not use `key`."""
    del key
    how = self.quantize

    def make(paths, method, w):
      rank, size = method.rank, min(w.shape[-2:])
      if rank > size:
        raise UserError(
          f"LoftQ: rank is {rank}, expected at most {size}, a side of "
          f"{paths[0]}"
        )
      if weights.unwrap(w) is not None:
        raise UserError(
          f"LoftQ: {paths[0]}: found a {type(w).__name__}, whose operation it"
          " would drop, expected a plain matrix; take Quantize, then Adapt"
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

    chosen = set(how.selected_paths(adapted))
    return tree.map_paths(settle, adapted, is_leaf=weights.is_weight)


@functools.partial(
  jax.jit, static_argnames=("rank", "scale", "steps", "first", "format")
)
def _fitted(w, *, rank, scale, steps, first, format):
  """Returns (packed, a, b) of a stack of matrices, mapped one by one."""
  lead = w.shape[:-2]
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(lead) :]), w)

  def one(w):
    return fit(weights.dense(w), rank, scale, steps, first, format)

  fitted = jax.lax.map(one, flat)
  return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), fitted)


def fit(
  w: Float[Array, "I O"],
  rank: int,
  scale: float,
  steps: int | Int[Array, ""] = 1,
  first: First = "codes",
  format: Format = Codebook(),
) -> tuple[QTensor, Float[Array, "R I"], Float[Array, "R O"]]:
  """Returns (q, a, b) such that `q + scale aᵀb` approximates `w`.

  Args:
    w: any floating-point dtype, to which q decodes.
    first: which is computed first, see `LoftQ`.
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
