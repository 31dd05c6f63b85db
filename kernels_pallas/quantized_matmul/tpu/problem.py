"""Arguments of the TPU kernels: a packed matrix divided into tiles."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas.quantized_matmul.planar import BLOCK, LANES, Planar
from kernels_pallas.quantized_matmul.tpu import dequantize
from kernels_pallas.quantized_matmul.tpu.tile_sizes import Tile

VMEM_LIMIT = 100 * 2**20


@dataclasses.dataclass(frozen=True)
class Problem:
  """Static facts of a matrix and its arrays.

  Attributes:
    tile: Tile sizes, fitted to the matrix.
    steps: Tiles along inputs and outputs.
    padded: Inputs and outputs of the matrix's arrays.
    bits: Bits per code.
    group: Inputs per scale.
    codebook: Values of 4-bit codes.
    arrays: codes [I' / 8 or I', O']; scale and optionally offset [steps or
      fewer, scales a step, O'].
  """

  tile: Tile
  steps: tuple[int, int]
  padded: tuple[int, int]
  bits: int
  group: int
  codebook: tuple[float, ...]
  arrays: dict[str, Any]

  @property
  def shift(self) -> float:
    """What must be added to decoded levels."""
    return dequantize.base(self.codebook)

  def words(self, n: int) -> int:
    """Returns the rows of the codes' array that n inputs take."""
    return n // 8 if self.bits == 4 else n

  def specs(self, place: Callable[..., Any]) -> dict[str, pl.BlockSpec]:
    """Returns the block specifications of the arrays.

    Args:
      place: Maps the ids of a grid step to the tile along inputs and outputs.
    """
    t = self.tile
    # Rounded up: the last tile of a group of all inputs may be partial.
    shared = np.int32(-(-self.group // t.inputs))

    def scales(*ids):
      k, o = place(*ids)
      return jax.lax.div(k, shared) if shared > 1 else k, 0, o

    specs = {"codes": pl.BlockSpec((self.words(t.inputs), t.outputs), place)}
    for name in ("scale", "offset"):
      if name in self.arrays:
        each = self.arrays[name].shape[1]
        specs[name] = pl.BlockSpec((None, each, t.outputs), scales)
    return specs

  def cost(self, rows: int, tiles: int) -> pl.CostEstimate:
    """Estimates a product of `rows` rows, in `tiles` tiles of rows."""
    (I, O), size = self.padded, 2
    weights = sum(x.size * x.dtype.itemsize for x in self.arrays.values())
    return pl.CostEstimate(
      flops=2 * rows * I * O,
      transcendentals=0,
      bytes_accessed=tiles * weights + rows * (I + O) * size,
    )


def prepare(w: Planar, tile: Tile, outputs: bool = False) -> Problem:
  """Divides a matrix into tiles no larger than `tile`.

  Args:
    w: Without leading axes.
    tile: Requested sizes.
    outputs: Whether outputs are summed over, which needs whole tiles of scales.
  """
  I, O = w.padded
  unit = BLOCK if w.group >= I else max(BLOCK, w.group)
  if unit > BLOCK and tile.inputs < unit:
    # Several steps share a scale.
    inputs = max(
      n for n in range(BLOCK, tile.inputs + 1, BLOCK) if w.group % n == 0
    )
    steps = I // inputs
  else:
    inputs, steps = fit(I, tile.inputs, unit)
  columns, across = fit(O, tile.outputs, LANES)

  def scales(x):
    each = max(1, inputs // w.group)
    # Reads past an array's end may be NaN, and 0 * NaN is NaN: codes are finite
    # for any bits, scales are zero-padded.
    rows = steps * each if w.group < I else 1
    end = across * columns - O if outputs else 0
    x = jnp.pad(x, ((0, max(0, rows - x.shape[0])), (0, end)))
    if x.dtype == jnp.float16:
      x = x.astype(jnp.float32)
    return x.reshape(-1, each, x.shape[1])

  arrays = {"codes": w.codes, "scale": scales(w.scale)}
  if w.offset is not None:
    arrays["offset"] = scales(w.offset)
  return Problem(
    tile=Tile(tile.rows, inputs, columns),
    steps=(steps, across),
    padded=(I, O),
    bits=w.bits,
    group=w.group,
    codebook=w.codebook,
    arrays=arrays,
  )


def fit(size: int, most: int, unit: int) -> tuple[int, int]:
  """Returns a tile's size and count: one, a divisor, or with little padding.

  Args:
    size: Size to cover.
    most: Largest tile.
    unit: Divisor of the tile.
  """
  whole = -(-size // unit) * unit
  most = max(unit, most // unit * unit)
  if whole <= most:
    return whole, 1
  for tile in range(most, most // 2, -unit):
    if whole % tile == 0:
      return tile, whole // tile
  count = -(-whole // most)
  tile = -(-whole // count // unit) * unit
  return tile, -(-whole // tile)


def precision(dtype: Any) -> Any:
  """Returns the matmul precision: full float32, in several bfloat16 passes."""
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def varying(x: jax.Array, shape: tuple[int, ...], dtype: Any):
  """Returns the type of an output that varies over the mesh as `x` does."""
  return jax.eval_shape(lambda x: jnp.zeros_like(x, dtype, shape=shape), x)
