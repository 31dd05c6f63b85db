"""The rule of each kind of mask, elementwise on indices and positions."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.masks import function_masks

KINDS = (
  *("full", "causal", "prefix", "block_causal", "block_diffusion"),
  *("function", "intervals"),
)


def allowed(mask: Any, i: Array, j: Array, q: Array, k: Array) -> Array:
  """Evaluates the mask's rule on indices i, j and positions q, k.

  A mask of intervals has the bounds of queries i alone.
  """
  match mask.kind:
    case "full":
      return jnp.ones((1, 1, 1), bool)
    case "causal":
      return k <= q
    case "prefix":
      return (k <= q) | (k < mask.prefix[:, None, None])
    case "block_causal":
      return k // mask.block <= q // mask.block
    case "block_diffusion":
      ours, theirs = q // mask.block, k // mask.block
      noisy_q, noisy_k = i < mask.length, j < mask.length
      own = noisy_q & noisy_k & (ours == theirs)
      before = noisy_q & ~noisy_k & (ours > theirs)
      clean = ~noisy_q & ~noisy_k & (ours >= theirs)
      return own | before | clean
    case "function":
      seen = function_masks.evaluate(mask.function, q, k)
      if mask.q_positions is not None:
        seen &= q < mask.extent
      return seen if mask.kv_positions is None else seen & (k < mask.extent)
    case "intervals":
      lo, hi = mask.bounds[:, 0::2, :, None], mask.bounds[:, 1::2, :, None]
      k = k[:, None]
      return ((k >= lo) & (k < hi)).any(1)
  raise ValueError(f"mask kind: found {mask.kind!r}, expected one of {KINDS}")


def diffusion_range(
  L: int, block: int, start: int, stop: int
) -> tuple[int, int]:
  """Bounds the keys that queries [start, stop) of block diffusion see."""
  lo, hi = (start // block * block, 0) if start < L else (L, L)
  if start < L:
    last = (min(stop, L) - 1) // block
    hi = L + last * block if last else min(block, L)
  if stop > L:
    hi = max(hi, L + min(L, -(-(stop - L) // block) * block))
  return lo, hi
