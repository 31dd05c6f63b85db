"""The rules that masks are of: which pairs each lets see each other."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.masks import function_masks

KINDS = (
  *("full", "causal", "prefix", "block_causal", "block_diffusion"),
  "function",
)


def holds(mask: Any, i: Array, j: Array, q: Array, k: Array) -> Array:
  """What the rule of a `Mask` says of indices i, j and positions q, k."""
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
      seen = function_masks.ask(mask.function, q, k)
      if mask.q_positions is not None:
        seen &= q < mask.extent
      return seen if mask.kv_positions is None else seen & (k < mask.extent)
  raise ValueError(f"mask kind: found {mask.kind!r}, expected one of {KINDS}")


def diffusion_range(
  L: int, block: int, start: int, stop: int
) -> tuple[int, int]:
  """The hull of what a tile of a block diffusion mask's queries sees."""
  lo, hi = (start // block * block, 0) if start < L else (L, L)
  if start < L:
    last = (min(stop, L) - 1) // block
    hi = L + last * block if last else min(block, L)
  if stop > L:
    hi = max(hi, L + min(L, -(-(stop - L) // block) * block))
  return lo, hi
