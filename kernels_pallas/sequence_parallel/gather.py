"""All-gather attention: every device gets all keys and values of a layer.

Gradients of keys and values are scattered back, summed. Memory for one
layer's keys and values is that of the whole sequence; what is computed is one
kernel over them, as in Llama 3's context parallelism (Grattafiori et al. 2024,
arXiv:2407.21783, section 3.3.2).
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float

from kernels_pallas.flash_attention.api import prepare
from kernels_pallas.flash_attention.spec import Operands
from kernels_pallas.masks import Mask
from kernels_pallas.sequence_parallel.zigzag import Names, halves


def gathered_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K Hv"],
  *,
  axis: Names,
  mask: Mask,
  sinks: Float[Array, " N"] | None = None,
  return_lse: bool = False,
  **options: Any,
) -> (
  Float[Array, "B T N Hv"]
  | tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]
):
  """`flash_attention` over the keys of all devices, under `jax.shard_map`.

  Args:
    q: This device's queries.
    k: This device's keys.
    v: This device's values.
    axis: Axes of the mesh that cut the tokens.
    mask: Of this device's queries and of all keys, in the order of the
      devices.
    sinks: As of `flash_attention`.
    return_lse: Also return the log-sum-exp.
    **options: Of `flash_attention`: scale, softcap, backend, config,
      interpret, precision.
  """
  T, S = q.shape[1], k.shape[1]
  k, v = (jax.lax.all_gather(y, axis, axis=1, tiled=True) for y in (k, v))
  x = Operands(q, k, v, mask, sinks=sinks)
  backend, spec = prepare(x, **options)
  spec = dataclasses.replace(spec, blocks=halves(spec.blocks, T, S))
  o, lse = backend.attend(spec, x)
  return (o, lse) if return_lse else o
