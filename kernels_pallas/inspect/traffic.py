"""HBM traffic of a Pallas TPU kernel, counted from its index maps.

A Pallas pipeline fetches a block if its index differs from that of the previous
grid step, and writes one back when it changes. So the index maps alone
determine the bytes that a kernel moves, on any machine
(kernels_pallas/MATH.md 5.3).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.common.target_platform import accumulator
from kernels_pallas.flash_attention.spec import Operands, Spec
from kernels_pallas.flash_attention.tpu import problem
from kernels_pallas.flash_attention.tpu.forward_kernel import grid_spec
from kernels_pallas.flash_attention.tpu.tile_sizes import Tile
from kernels_pallas.masks import Mask


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Bytes moved and FLOPs of one call.

  Attributes:
    bytes: Bytes by operand.
    flops: FLOPs of its matmuls, for visible pairs only.
  """

  bytes: Mapping[str, int]
  flops: int

  @property
  def total(self) -> int:
    """Bytes of all operands."""
    return sum(self.bytes.values())

  @property
  def intensity(self) -> float:
    """Arithmetic intensity: FLOPs per byte."""
    return self.flops / self.total


def count_traffic(
  grid: Sequence[int],
  specs: Mapping[str, Any],
  sizes: Mapping[str, int],
  *prefetched: Any,
) -> dict[str, int]:
  """Returns the bytes that each operand moves, over all steps of a grid.

  Args:
    grid: Steps per axis; the last changes fastest.
    specs: Block specifications by operand. Operands without a block shape are
      not pipelined, and not counted.
    sizes: Bytes per element by operand.
    prefetched: The scalar arguments that the index maps take after the ids.
  """
  steps = np.indices(grid).reshape(len(grid), -1).astype(np.int32)

  @jax.jit
  def indices(steps, prefetched):
    return {
      name: jax.vmap(
        lambda ids, spec=spec: jnp.stack(
          [jnp.asarray(i, jnp.int32) for i in spec.index_map(*ids, *prefetched)]
        )
      )(tuple(steps))
      for name, spec in specs.items()
      if spec.block_shape is not None
    }

  found = {}
  for name, index in indices(steps, prefetched).items():
    moved = 1 + int((np.diff(np.asarray(index), axis=0) != 0).any(1).sum())
    block = math.prod(n for n in specs[name].block_shape if n is not None)
    found[name] = moved * block * sizes[name]
  return found


def forward_traffic(
  length: int,
  head_dim: int,
  tile: Tile,
  dtype: Any = jnp.bfloat16,
  mask: Mask | None = None,
) -> Traffic:
  """Returns the traffic of our forward TPU kernel for one head.

  Args:
    length: Number of queries and of keys.
    head_dim: Head dim of q, k and v.
    tile: Sizes in tokens.
    dtype: Dtype of q, k and v.
    mask: A mask that depends on indices alone; default full.
  """
  x = jnp.zeros((1, length, 1, head_dim), dtype)
  mask = mask or Mask.full()
  p = problem.prepare(Spec(head_dim**-0.5), Operands(x, x, x, mask), tile)
  spec = grid_spec(p)
  specs = {**spec.in_specs[0], "o": spec.out_specs[0], "lse": spec.out_specs[1]}
  sizes = {name: one.dtype.itemsize for name, one in p.arrays.items()}
  sizes |= {"o": x.dtype.itemsize, "lse": accumulator(dtype).itemsize}
  found = count_traffic(spec.grid, specs, sizes, p.table(2), p.seed())
  lo, hi = p.found.bounds[0, 0::2], p.found.bounds[0, 1::2]
  pairs = int(np.maximum(np.minimum(hi, length) - lo, 0).sum())
  return Traffic(found, 4 * head_dim * pairs)


def standard_traffic(
  length: int, head_dim: int, dtype: Any = jnp.bfloat16
) -> Traffic:
  """Returns the traffic of attention that materialises its scores in memory.

  S = q k^T is written and read, and P = softmax(S) too (Dao et al. 2022,
  "FlashAttention", algorithm 0). Arguments as in `forward_traffic`.
  """
  size = jnp.dtype(dtype).itemsize
  matrix, rows = length * length * size, length * head_dim * size
  moved = {"q": rows, "k": rows, "v": rows, "o": rows}
  moved |= {"scores": 2 * matrix, "probabilities": 2 * matrix}
  return Traffic(moved, 4 * length * length * head_dim)
