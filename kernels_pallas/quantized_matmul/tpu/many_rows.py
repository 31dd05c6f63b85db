"""Packed-weight matmul kernel for many rows on TPUs: bound by the matrix units.

Not yet run on a TPU: the interpreter checks numbers and races, libtpu's
compiler for v4 to tpu7x schedules and spills.

A tile of weights is dequantized once, rounded to the activations' dtype, and
multiplied with a tile of rows. The transposed product is the input gradient.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.quantized_matmul.planar import BLOCK, LANES
from kernels_pallas.quantized_matmul.tpu import dequantize
from kernels_pallas.quantized_matmul.tpu.problem import (
  VMEM_LIMIT,
  Problem,
  fit,
  precision,
  varying,
)

COLUMNS = 256
"""Outputs dequantized at a time."""


@dataclasses.dataclass(frozen=True)
class Direction:
  """Which axis of the matrix is summed over.

  Attributes:
    name: Kernel name.
    contracted: Axis of the matrix, 0 (inputs) or 1 (outputs).
    place: Maps (outer, inner) tiles to those along (inputs, outputs).
  """

  name: str
  contracted: int
  place: Callable[[Any, Any], tuple[Any, Any]]

  def sizes(self, inputs: Any, outputs: Any) -> tuple[Any, Any]:
    """Orders values for inputs and outputs as (kept, summed over)."""
    return (outputs, inputs) if self.contracted == 0 else (inputs, outputs)

  def add(self, total, x, weights, here: slice):
    """Adds the product with some columns of the weights."""
    rows = x[...] if self.contracted == 0 else x[:, here]
    product = jax.lax.dot_general(
      rows,
      weights[:, here],
      (((1,), (self.contracted,)), ((), ())),
      precision=precision(rows.dtype),
      preferred_element_type=jnp.float32,
    )
    if self.contracted == 0:
      total[:, here] += product
    else:
      total[...] += product


FORWARD = Direction("quantized_matmul_many", 0, lambda kept, k: (k, kept))
GRADIENT = Direction("quantized_matmul_gradient", 1, lambda kept, k: (kept, k))


def multiply_many_rows(
  x: jax.Array, p: Problem, way: Direction, dtype: Any, interpret: Any
) -> jax.Array:
  """Returns `x W` [M, O'] or `x W^T` [M, I'], rounded to `dtype`.

  Args:
    x: [M, I'] or [M, O'], bfloat16 or float32.
    p: The matrix in tiles.
    way: `FORWARD` or `GRADIENT`.
    dtype: Dtype of the result.
    interpret: As in `pl.pallas_call`.
  """
  M, t = len(x), p.tile
  # Tiles are sized for bfloat16: v4 has 16 MiB of VMEM.
  rows, tiles = fit(M, 2 * t.rows // x.dtype.itemsize, 16)
  kept, depth = way.sizes(t.inputs, t.outputs)
  across, steps = way.sizes(*p.steps)
  width, _ = way.sizes(*p.padded)
  x = jnp.pad(x, ((0, 0), (0, steps * depth - x.shape[1])))
  y = pl.pallas_call(
    functools.partial(_kernel, p, way),
    grid=(tiles, across, steps),
    in_specs=[
      pl.BlockSpec((rows, depth), lambda m, o, k: (m, k)),
      p.specs(lambda m, o, k: way.place(o, k)),
    ],
    out_specs=pl.BlockSpec((rows, kept), lambda m, o, k: (m, o)),
    out_shape=varying(x, (M, width), dtype),
    scratch_shapes=[
      pltpu.VMEM((rows, kept), jnp.float32),
      pltpu.VMEM((t.inputs, t.outputs), x.dtype),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=VMEM_LIMIT,
    ),
    cost_estimate=p.cost(M, tiles),
    interpret=interpret,
    name=way.name,
  )(x, p.arrays)
  return y


def _kernel(p: Problem, way: Direction, x, refs, y, total, weights):
  k = pl.program_id(2)

  @pl.when(k == 0)
  def _():
    total[...] = jnp.zeros(total.shape, total.dtype)

  width = COLUMNS if p.tile.outputs % COLUMNS == 0 else LANES
  tables = dequantize.tables(p.codebook, weights.dtype)
  columns = [slice(o, o + width) for o in range(0, p.tile.outputs, width)]

  def decode_to(here):
    for n in range(0, p.tile.inputs, BLOCK):
      weights[n : n + BLOCK, here] = _weights(
        p, refs, n, here, tables, weights.dtype
      )

  decode_to(columns[0])
  for here, following in zip(columns, [*columns[1:], None], strict=True):
    # Before the product, so that it overlaps with the matrix units.
    if following is not None:
      decode_to(following)
    way.add(total, x, weights, here)

  @pl.when(k == pl.num_programs(2) - 1)
  def _():
    y[...] = total[...].astype(y.dtype)


def _weights(p: Problem, refs, n: int, here: slice, tables, dtype):
  """Returns a block's weights, scaled in float32, [128, width]."""
  words = refs["codes"][p.words(n) : p.words(n + BLOCK), here]
  found = dequantize.levels(words, p.codebook, dtype, tables)
  found = found.astype(jnp.float32)
  first = n // p.group
  groups = slice(first, first + max(1, BLOCK // p.group))
  scale = refs["scale"][groups, here].astype(jnp.float32)
  offset = None
  if "offset" in refs:
    offset = refs["offset"][groups, here].astype(jnp.float32)
  return dequantize.scaled(found, scale, offset, p.group, p.shift).astype(dtype)
