"""Ulysses attention: an all-to-all exchanges token shards for head shards.

One all-to-all each for q, k and v before attention, and one for the output
after it; in between each device has every token of N / n heads and attends
locally (Jacobs et al. 2023, "DeepSpeed Ulysses", arXiv:2309.14509).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.flash_attention.api import flash_attention
from kernels_pallas.masks import Mask
from kernels_pallas.sequence_parallel.zigzag import MeshAxes


def ulysses_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K Hv"],
  *,
  axis: MeshAxes,
  mask: Mask,
  sinks: Float[Array, " N"] | None = None,
  return_lse: bool = False,
  attend: Callable[..., Any] = flash_attention,
  **options: Any,
) -> (
  Float[Array, "B T N Hv"]
  | tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]
):
  """`attend` over the tokens of all devices, under `jax.shard_map`.

  If n does not divide the key heads, each key head is repeated as needed.

  Args:
    q: This device's queries.
    k: This device's keys.
    v: This device's values.
    axis: Mesh axes that shard the tokens, n devices.
    mask: Mask of all queries and keys that `attend` gets.
    sinks: As in `flash_attention`.
    return_lse: Also return the log-sum-exp.
    attend: `flash_attention`, or attention across further axes that shard T.
    **options: Options of `attend`.

  Raises:
    ValueError: n does not divide the query heads.
  """
  n, N, K = jax.lax.axis_size(axis), q.shape[2], k.shape[2]
  if N % n:
    raise ValueError(
      f"ulysses: found {N} query heads over {n} devices, expected a multiple; "
      "ring or all-gather attention does not shard heads"
    )
  times = n // math.gcd(K, n)
  if times > 1:
    k, v = (jnp.repeat(y, times, axis=2) for y in (k, v))
  q, k, v = (
    jax.lax.all_to_all(y, axis, split_axis=2, concat_axis=1, tiled=True)
    for y in (q, k, v)
  )
  if sinks is not None:
    first = jax.lax.axis_index(axis) * (N // n)
    sinks = jax.lax.dynamic_slice_in_dim(sinks, first, N // n)
  o, lse = attend(q, k, v, mask=mask, sinks=sinks, return_lse=True, **options)
  o = jax.lax.all_to_all(o, axis, split_axis=1, concat_axis=2, tiled=True)
  if not return_lse:
    return o
  lse = jax.lax.all_to_all(lse, axis, split_axis=2, concat_axis=1, tiled=True)
  return o, lse
