"""Packed-weight matmul kernel for few rows on TPUs: bound by the weights'
bytes.

Not yet run on a TPU: the interpreter checks numbers and races, libtpu's
compiler for v4 to tpu7x schedules and spills.

Products of each group's codes with the rows are scaled, not weights. With
groups below 128, the depth of a matrix unit, a row is repeated for each group
of a block, with zeros elsewhere, so that one product yields all groups' sums
separately. Since rows are few, a matrix unit spends its time loading 128 x 128
weights.
"""

import functools
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

DEPTH = 512
"""Most inputs per product."""

COLUMNS = 256
"""Outputs processed at a time."""


def multiply_few_rows(
  x: jax.Array, p: Problem, dtype: Any, interpret: Any
) -> jax.Array:
  """Returns `x W` [M, O'], summed in float32, rounded to `dtype`.

  Args:
    x: [M, I'], bfloat16, float32, or int8 with 8-bit codes.
    p: The matrix in tiles.
    dtype: Dtype of the result.
    interpret: As in `pl.pallas_call`.
  """
  M, t = len(x), p.tile
  rows, tiles = fit(M, t.rows, 8)
  copies = max(1, BLOCK // p.group)
  steps, columns = p.steps
  spread = _spread(x, rows * tiles, steps * t.inputs, p.group)
  # [tiles of rows, steps, copies * rows, inputs of a step]
  spread = spread.reshape(copies, tiles, rows, steps, t.inputs)
  spread = spread.transpose(1, 3, 0, 2, 4)
  spread = spread.reshape(tiles, steps, copies * rows, t.inputs)
  weights = p.specs(lambda m, o, k: (k, o))
  y = pl.pallas_call(
    functools.partial(_kernel, p),
    grid=(tiles, columns, steps),
    in_specs=[
      pl.BlockSpec((None, *spread.shape[1:]), lambda m, o, k: (m, 0, 0, 0)),
      weights,
    ],
    out_specs=pl.BlockSpec((rows, t.outputs), lambda m, o, k: (m, o)),
    out_shape=varying(x, (rows * tiles, p.padded[1]), dtype),
    scratch_shapes=[pltpu.VMEM((rows, t.outputs), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=VMEM_LIMIT,
    ),
    cost_estimate=p.cost(M, tiles),
    interpret=interpret,
    name="quantized_matmul_few",
  )(spread, p.arrays)
  return y[:M]


def _spread(x: jax.Array, rows: int, inputs: int, group: int) -> jax.Array:
  """Repeats rows for each group of a block, [copies, rows, inputs]."""
  x = jnp.pad(x, ((0, rows - x.shape[0]), (0, inputs - x.shape[1])))
  copies = max(1, BLOCK // group)
  if copies == 1:
    return x[None]
  owner = jnp.arange(inputs) // group % copies
  own = owner == jnp.arange(copies)[:, None, None]
  return jnp.where(own, x, jnp.zeros((), x.dtype))


def _kernel(p: Problem, x, refs, y, total):
  k = pl.program_id(2)

  @pl.when(k == 0)
  def _():
    total[...] = jnp.zeros(total.shape, total.dtype)

  depth = DEPTH
  while p.tile.inputs % depth or max(p.group, BLOCK) % depth:
    depth -= BLOCK
  width = COLUMNS if p.tile.outputs % COLUMNS == 0 else LANES
  parts = range(0, p.tile.inputs, depth)
  sums = [_sum(p, x[k, :, n : n + depth]) for n in parts]
  tables = dequantize.tables(p.codebook, x.dtype)
  for o in range(0, p.tile.outputs, width):
    here = slice(o, o + width)
    found = total[:, here]
    for n, rowsums in zip(parts, sums, strict=True):
      rows = x[k, :, n : n + depth]
      found += _part(p, rows, refs, n, depth, here, rowsums, tables)
    total[:, here] = found

  @pl.when(k == pl.num_programs(2) - 1)
  def _():
    y[...] = total[...].astype(y.dtype)


def _sum(p: Problem, x):
  """Sums rows, if weights are not just multiples of codes."""
  if not p.shift and "offset" not in p.arrays:
    return None
  return jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True)


def _part(p: Problem, x, refs, n, depth, here, rowsums, tables):
  """Returns the product with inputs n to n + depth of a tile, [rows, width]."""
  words = refs["codes"][p.words(n) : p.words(n + depth), here]
  if x.dtype == jnp.int8:
    found = jnp.dot(x, words, preferred_element_type=jnp.int32)
    found = found.astype(jnp.float32)
  else:
    found = jnp.dot(
      x,
      dequantize.levels(words, p.codebook, x.dtype, tables),
      precision=precision(x.dtype),
      preferred_element_type=jnp.float32,
    )
  copies = max(1, BLOCK // p.group)
  rows = x.shape[0] // copies
  total = jnp.zeros((rows, found.shape[1]), jnp.float32)
  for copy in range(copies):
    own = slice(copy * rows, (copy + 1) * rows)
    g = n // p.group + copy
    scale = refs["scale"][g : g + 1, here].astype(jnp.float32)
    product = found[own]
    if p.shift:
      product += p.shift * rowsums[own]
    total += product * scale
    if "offset" in refs:
      offset = refs["offset"][g : g + 1, here].astype(jnp.float32)
      total += rowsums[own] * offset
  return total
