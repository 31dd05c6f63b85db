"""How products with packed weights are cut for a GPU.

A block holds `groups` pieces of a tile of rows, each of 64 outputs (or, for the
input gradient, of the inputs of a block of words), and walks over what is
summed. On Hopper a warpgroup computes each piece, and one more copies; a block
of `mma` is one warpgroup.
"""

import dataclasses

import jax.numpy as jnp

CORES = ("wgmma", "mma")
OPERANDS = ("registers", "shared")
SHARED_BYTES = {"wgmma": 232_448, "mma": 101_376}
"""Shared memory that a block may ask for: of Hopper, and of Ada."""

MOST = {"wgmma": 256, "mma": 80}
"""Rows of the largest tile: the N of `wgmma`; sums that registers hold, beside
decoded weights of two pieces (codebooks spill with 96)."""

LEAST_ROWS = {"wgmma": 8, "mma": 16}
"""Of the smallest, and what others are multiples of: a block of `mma` copies 16
bytes a thread."""

LEAST_CODES = 32
"""Likewise for `mma` of rows of 8-bit codes, of half the bytes."""

CHUNK = 64
"""Rows that leave at a time, from Hopper's kernel."""

LEAST = 4
"""Steps that a split has at least."""

STAGES = {"wgmma": 6, "mma": 4}
"""Buffers that are enough to hide how long memory takes; of `mma`, of which a
multiprocessor has several blocks."""

RESERVED = 2048
"""Bytes of shared memory for barriers and what the compiler adds."""

PROCESSORS = {"wgmma": 132, "mma": 264}
"""Blocks that there should be: multiprocessors of an H100; and twice as many of
those that share one."""

DTYPES = (jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Tile:
  """Sizes of a kernel.

  Attributes:
    rows: Of activations, a multiple of `LEAST_ROWS`, at most `MOST`.
    groups: Pieces of a block, by as many warpgroups, of `mma` by one.
    stages: Buffers for what is streamed.
    splits: Parts of what is summed, each summed by a block of its own; their
      sums, in float32, are added up afterwards.
    operand: Where weights are multiplied from: 'registers', or 'shared' memory,
      by `wgmma`, which the GPU interpreter can run.
    cores: Of `CORES`: `wgmma` of Hopper, or `mma`, which others have, too.
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
    least, most = LEAST_ROWS[self.cores], MOST[self.cores]
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


def fitted(
  cores: str,
  rows: int,
  pieces: int,
  steps: int,
  depth: int,
  sums: int,
  codes: bool = False,
) -> Tile:
  """A tile for a product that is not told one.

  Args:
    cores: Of `CORES`.
    rows: Of activations.
    pieces: Along what is not summed, of which a block has `groups`.
    steps: That they walk over.
    depth: Of a step.
    sums: Accumulators of a piece.
    codes: Whether rows are 8-bit codes.
  """
  wgmma = cores == "wgmma"
  least = LEAST_CODES if codes else LEAST_ROWS[cores]
  size = -(-rows // least) * least
  if wgmma and size > CHUNK:
    size = min(MOST[cores] // sums, -(-size // CHUNK) * CHUNK)
  elif not wgmma:
    # As even as can be.
    most = MOST[cores] // least * least
    size = -(-size // -(-size // most) // least) * least
  # A warpgroup of `mma` holds two sums, which share what is read of rows.
  many = 2 if wgmma else 2 // sums
  groups = many if pieces % many == 0 else 1
  blocks = pieces // groups * -(-rows // size)
  # Few blocks leave multiprocessors idle, and memory with too few requests.
  splits = max(1, min(PROCESSORS[cores] // blocks, steps // LEAST))
  # Words and at most 8 float32 scales and offsets of 64 outputs, a group.
  stage = 2 * size * depth + groups * 64 * 4 * (16 + 2 * 8)
  left = SHARED_BYTES[cores] - RESERVED
  if wgmma:
    left -= groups * min(size, CHUNK) * 64 * 4
  stages = max(2, min(STAGES[cores], left // stage))
  return Tile(size, groups, stages, splits, cores=cores)
