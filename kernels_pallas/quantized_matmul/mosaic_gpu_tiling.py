"""How products with packed weights are cut for a Hopper GPU.

A block of threads has `groups` warpgroups that compute and one that copies.
Each of them holds 64 outputs (or, for the input gradient, the inputs of a block
of words) of a tile of rows, and walks over what is summed.
"""

import dataclasses

import jax.numpy as jnp

OPERANDS = ("registers", "shared")
SHARED_BYTES = 232_448
"""Shared memory that a block of Hopper may ask for."""

MOST = 256
"""Rows of the largest tile: the N of `wgmma`."""

EIGHT = 8
"""Rows of the smallest."""

CHUNK = 64
"""Rows that leave at a time."""

LEAST = 4
"""Steps that a split has at least."""

STAGES = 6
"""Buffers that are enough to hide how long memory takes."""

RESERVED = 2048
"""Bytes of shared memory for barriers and what the compiler adds."""

PROCESSORS = 132
"""Multiprocessors of an H100, which blocks should fill."""

DTYPES = (jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Tile:
  """Sizes of a kernel.

  Attributes:
    rows: Of activations, a multiple of 8, at most 256.
    groups: Warpgroups that compute.
    stages: Buffers for what is streamed.
    splits: Parts of what is summed, each summed by a block of its own; their
      sums, in float32, are added up afterwards.
    operand: Where weights are multiplied from: 'registers', or 'shared' memory,
      which the GPU interpreter can run.
  """

  rows: int = 128
  groups: int = 2
  stages: int = 4
  splits: int = 1
  operand: str = "registers"

  def __post_init__(self):
    whole = self.rows % EIGHT == 0 and 0 < self.rows <= MOST
    whole &= self.rows <= CHUNK or self.rows % CHUNK == 0
    if not whole or min(self.groups, self.stages, self.splits) < 1:
      raise ValueError(
        f"tile: found {self}, expected rows in multiples of {EIGHT} up to "
        f"{CHUNK}, and of {CHUNK} up to {MOST}; at least 1 of the others"
      )
    if self.operand not in OPERANDS:
      raise ValueError(
        f"tile.operand: found {self.operand!r}, expected one of {OPERANDS}"
      )


def fitted(rows: int, pieces: int, steps: int, depth: int, sums: int) -> Tile:
  """A tile for a product that is not told one.

  Args:
    rows: Of activations.
    pieces: Along what is not summed, one for each warpgroup.
    steps: That they walk over.
    depth: Of a step.
    sums: Accumulators of a warpgroup.
  """
  size = -(-rows // EIGHT) * EIGHT
  if size > CHUNK:
    size = min(MOST // sums, -(-size // CHUNK) * CHUNK)
  groups = 2 if pieces % 2 == 0 else 1
  blocks = pieces // groups * -(-rows // size)
  # Few blocks leave multiprocessors idle, and memory with too few requests.
  splits = max(1, min(PROCESSORS // blocks, steps // LEAST))
  # Words and at most 8 float32 scales and offsets of 64 outputs, a group.
  stage = 2 * size * depth + groups * 64 * 4 * (16 + 2 * 8)
  left = SHARED_BYTES - groups * min(size, CHUNK) * 64 * 4 - RESERVED
  return Tile(size, groups, min(STAGES, left // stage), splits)
