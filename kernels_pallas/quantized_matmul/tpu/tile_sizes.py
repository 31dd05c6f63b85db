"""Tile sizes of the packed-weight matmul on TPUs."""

import dataclasses

from kernels_pallas.quantized_matmul.planar import BLOCK, LANES


@dataclasses.dataclass(frozen=True)
class Tile:
  """Sizes of a grid step.

  Attributes:
    rows: Rows of activations.
    inputs: Inputs of the matrix, a multiple of 128.
    outputs: Outputs of the matrix, a multiple of 128.
  """

  rows: int
  inputs: int
  outputs: int

  def __post_init__(self):
    fits = self.rows > 0 and self.inputs > 0 and self.outputs > 0
    if not fits or self.inputs % BLOCK or self.outputs % LANES:
      raise ValueError(
        f"tile: found {self}, expected positive rows, inputs and outputs in "
        f"multiples of {BLOCK}"
      )


@dataclasses.dataclass(frozen=True)
class Config:
  """Tile sizes of the matmul.

  Attributes:
    few: Tile for few rows.
    many: Tile for many rows.
    gradient: Tile for the input gradient.
    most: Rows, times the groups per block, up to which `few_rows` is used.
  """

  few: Tile = Tile(256, 2048, 1024)
  many: Tile = Tile(1024, 1024, 512)
  gradient: Tile = Tile(1024, 512, 1024)
  most: int = 128
