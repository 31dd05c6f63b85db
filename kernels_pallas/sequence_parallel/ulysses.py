"""Ulysses: each device gives its tokens of other heads for all of its own.

One all-to-all each of q, k and v before attention and one of the output after
it; in between a device has every token of N / n heads and computes as if alone
(Jacobs et al. 2023, "DeepSpeed Ulysses", arXiv:2309.14509).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.flash_attention.api import flash_attention
from kernels_pallas.masks import Mask
from kernels_pallas.sequence_parallel.zigzag import Names


def ulysses_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K Hv"],
  *,
  axis: Names,
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

  Where n does not divide the key heads, each is sent as often as n needs.

  Args:
    q: This device's queries.
    k: This device's keys.
    v: This device's values.
    axis: Axes of the mesh that cut the tokens, n devices.
    mask: Of all queries and keys that `attend` gets.
    sinks: As of `flash_attention`.
    return_lse: Also return the log-sum-exp.
    attend: `flash_attention`, or what crosses the axes that cut T / n further.
    **options: Of `attend`.

  Raises:
    ValueError: n does not divide the query heads.
  """
  n, N, K = jax.lax.axis_size(axis), q.shape[2], k.shape[2]
  if N % n:
    raise ValueError(
      f"ulysses: found {N} query heads over {n} devices, expected a multiple; "
      "a ring, or gathered keys, ask nothing of heads"
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
