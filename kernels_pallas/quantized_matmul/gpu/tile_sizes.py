"""Tile sizes of the packed-weight matmul on GPUs.

A block computes `groups` pieces of a tile of rows, each of 64 outputs (or, for
the input gradient, of the inputs of a block of words), and loops over the
summed axis. On Hopper each piece has a warpgroup, and one more copies; a block
of `mma` is one warpgroup.
"""

import dataclasses

import jax.numpy as jnp

CORES = ("wgmma", "mma")
OPERANDS = ("registers", "shared")
SHARED_BYTES = {"wgmma": 232_448, "mma": 101_376}
"""Shared memory available to a block: on Hopper, and on Ada."""

MAX_ROWS = {"wgmma": 256, "mma": 80}
"""Rows of the largest tile: the N of `wgmma`; for `mma`, the accumulators that
fit in registers with dequantized weights of two pieces (codebooks spill with
96)."""

MIN_ROWS = {"wgmma": 8, "mma": 16}
"""Rows of the smallest tile, of which others are multiples: a block of `mma`
copies 16 bytes per thread."""

MIN_CODES = 32
"""The same for `mma` with 8-bit rows, which have half the bytes."""

CHUNK = 64
"""Rows that Hopper's kernel stores at a time."""

LEAST = 4
"""Fewest steps per split."""

STAGES = {"wgmma": 6, "mma": 4}
"""Buffers that suffice to hide memory latency; fewer for `mma`, with several
blocks per multiprocessor."""

RESERVED = 2048
"""Bytes of shared memory for barriers and the compiler's additions."""

PROCESSORS = {"wgmma": 132, "mma": 264}
"""Blocks to aim for: the multiprocessors of an H100; twice as many where two
share one."""

DTYPES = (jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Tile:
  """Tile sizes of a kernel.

  Attributes:
    rows: Rows of activations, a multiple of `LEAST_ROWS`, at most `MOST`.
    groups: Pieces per block, by as many warpgroups; by one for `mma`.
    stages: Buffers for streamed operands.
    splits: Parts of the summed axis, each summed by its own block; the float32
      results are added afterwards.
    operand: Where weights are multiplied from: 'registers', or 'shared' memory
      with `wgmma`, which the GPU interpreter supports.
    cores: One of `CORES`: `wgmma` of Hopper, or `mma`, which others have, too.
  """

  rows: int = 128
  groups: int = 2
  stages: int = 4
  splits: int = 1
  operand: str = "registers"
  cores: str = "wgmma"

  def __post_init__(self):
    for name, known in (("operand", OPERANDS), ("cores", CORES)):
      if getattr(self, name) not in known:
        raise ValueError(
          f"tile.{name}: found {getattr(self, name)!r}, expected one of {known}"
        )
    least, most = MIN_ROWS[self.cores], MAX_ROWS[self.cores]
    whole = self.rows % least == 0 and 0 < self.rows <= most
    whole &= self.cores == "mma" or self.rows <= CHUNK or not self.rows % CHUNK
    few = self.stages < (2 if self.cores == "mma" else 1)
    if not whole or few or min(self.groups, self.splits) < 1:
      sizes = f"{least} up to {most}"
      if self.cores == "wgmma":
        sizes = f"{least} up to {CHUNK}, and of {CHUNK} up to {most}"
      raise ValueError(
        f"tile: found {self}, expected rows in multiples of {sizes}; at least "
        "1 of the others, and 2 stages for mma"
      )
    if self.cores == "mma" and self.operand != "registers":
      raise ValueError("tile.operand: found 'shared', mma takes registers")


def default_tile(
  cores: str,
  rows: int,
  pieces: int,
  steps: int,
  depth: int,
  sums: int,
  codes: bool = False,
) -> Tile:
  """Returns the default tile of a product.

  Args:
    cores: One of `CORES`.
    rows: Rows of activations.
    pieces: Pieces along the axis that is not summed.
    steps: Steps along the summed axis.
    depth: Depth of a step.
    sums: Accumulators per piece.
    codes: Whether rows are 8-bit codes.
  """
  wgmma = cores == "wgmma"
  least = MIN_CODES if codes else MIN_ROWS[cores]
  size = -(-rows // least) * least
  if wgmma and size > CHUNK:
    size = min(MAX_ROWS[cores] // sums, -(-size // CHUNK) * CHUNK)
  elif not wgmma:
    # Tiles as even as possible.
    most = MAX_ROWS[cores] // least * least
    size = -(-size // -(-size // most) // least) * least
  # An `mma` warpgroup has two accumulators, which share each read of rows.
  many = 2 if wgmma else 2 // sums
  groups = many if pieces % many == 0 else 1
  blocks = pieces // groups * -(-rows // size)
  # Few blocks leave multiprocessors idle, and few memory requests in flight.
  splits = max(1, min(PROCESSORS[cores] // blocks, steps // LEAST))
  # Words and at most 8 float32 scales and offsets of 64 outputs, per group.
  stage = 2 * size * depth + groups * 64 * 4 * (16 + 2 * 8)
  left = SHARED_BYTES[cores] - RESERVED
  if wgmma:
    left -= groups * min(size, CHUNK) * 64 * 4
  stages = max(2, min(STAGES[cores], left // stage))
  return Tile(size, groups, stages, splits, cores=cores)
