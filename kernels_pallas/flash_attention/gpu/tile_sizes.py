"""Tile sizes of the GPU kernels, from their registers and shared memory.

A warpgroup (128 threads) computes 64 rows, the height of a `wgmma`, or the 128
of a `tcgen05.mma`. The rows of all warpgroups of a block stay in shared memory,
while tiles of the other side (keys for queries, queries for keys) are streamed
through `stages` buffers. The limits are 232,448 bytes of shared memory per
block, 65,536 registers per multiprocessor, and with `tcgen05` the 512 columns
of tensor memory that hold products and accumulators.
"""

import dataclasses
import math

ROWS = 64
"""Rows of a warpgroup: the M of `wgmma`."""

LANES = 128
"""Rows of a warpgroup with `tcgen05`: the lanes of tensor memory."""

STREAMED = 32
"""Tokens of a streamed tile are a multiple; of `ROWS` for `wgmma`."""

COLUMNS = 64
"""Head dims are padded to a multiple: a swizzled row of 128 bytes."""

SHARED_BYTES = 232_448
"""Shared memory available to a block on Hopper or Blackwell."""

OPERANDS = ("registers", "shared")
CORES = ("wgmma", "mma", "tcgen05")
PRODUCTS = ("both", "one")

# Registers per thread of (a computing, the copying) warpgroup, by the number of
# computing ones; a multiprocessor has 65,536, in units of 8 per thread.
REGISTERS = {2: (240, 24), 3: (160, 32)}

PROGRAMS = 132
"""Multiprocessors of an H100 SXM, H200 or GH200."""


def height(cores: str) -> int:
  """Returns the rows of a warpgroup, by `GpuTiles.cores`."""
  return LANES if cores == "tcgen05" else ROWS


@dataclasses.dataclass(frozen=True)
class GpuTile:
  """Sizes of one kernel.

  Attributes:
    groups: Computing warpgroups, of `height` rows each; one more copies.
    streamed: Tokens per tile of the streamed side, a multiple of 32.
    stages: Buffers for its two operands (keys and values, or queries and
      cotangents).
    products: How a backward kernel issues its two products of a tile: 'both' at
      once, or 'one' after the other, which needs fewer registers. Ignored for
      'tcgen05', whose products are not in registers.
    height: Rows of a warpgroup: 64, or 128 for 'tcgen05'.
  """

  groups: int = 2
  streamed: int = 128
  stages: tuple[int, int] = (2, 2)
  products: str = "both"
  height: int = ROWS

  def __post_init__(self):
    if self.products not in PRODUCTS:
      raise ValueError(
        f"tile.products: found {self.products!r}, expected one of {PRODUCTS}"
      )
    bad = self.streamed < 1 or self.streamed % STREAMED or min(self.stages) < 1
    if bad or not 1 <= self.groups <= 3:  # noqa: PLR2004
      raise ValueError(
        f"tile: found {self}, expected 1 to 3 groups, streamed a multiple of "
        f"{STREAMED}, and at least 1 stage"
      )

  @property
  def rows(self) -> int:
    """Tokens of the stationary side per block."""
    return self.groups * self.height


@dataclasses.dataclass(frozen=True)
class GpuTiles:
  """Tile sizes of every kernel.

  Attributes:
    forward: Queries stationary, keys streamed.
    dkv: Keys stationary, queries streamed.
    dq: Queries stationary, keys streamed.
    gradients: What each kernel that streams queries computes: ('dk', 'dv') both
      in one; ('dk',), ('dv',) in separate kernels, if registers do not suffice.
    operand: Where the left operand of the second matmul comes from:
      'registers', which is fast, or 'shared' memory, which the GPU interpreter
      supports. With 'tcgen05' it comes from tensor memory, if there is room.
    cores: The tensor core instruction: 'wgmma' of Hopper, 'tcgen05' of
      Blackwell, or 'mma' of Ampere and Ada, whose kernels have one group.
    programs: Blocks of threads of a persistent kernel: one per multiprocessor.
      The kernels of 'mma' are not persistent.
  """

  forward: GpuTile = GpuTile()
  dkv: GpuTile = GpuTile(2, 64, products="one")
  dq: GpuTile = GpuTile(2, 64)
  gradients: tuple[tuple[str, ...], ...] = (("dk", "dv"),)
  operand: str = "registers"
  cores: str = "wgmma"
  programs: int = PROGRAMS

  def __post_init__(self):
    if self.programs < 1:
      raise ValueError(
        f"tiles.programs: found {self.programs}, expected at least 1"
      )
    tiles = self.forward, self.dkv, self.dq
    groups = max(t.groups for t in tiles)
    if self.cores != "mma" and any(t.streamed % ROWS for t in tiles):
      raise ValueError(
        f"tiles: found {tiles}, expected streamed a multiple of {ROWS} for "
        f"{self.cores!r}"
      )
    rows = height(self.cores)
    if any(t.height != rows for t in tiles):
      raise ValueError(
        f"tiles: found {tiles}, expected height {rows} for {self.cores!r}"
      )
    if self.cores not in CORES or (self.cores == "mma" and groups != 1):
      raise ValueError(
        f"tiles.cores: found {self.cores!r} and {groups} groups, expected one "
        f"of {CORES}, and 1 group for 'mma'"
      )
    if self.operand not in OPERANDS:
      raise ValueError(
        f"tiles.operand: found {self.operand!r}, expected one of {OPERANDS}"
      )
    both = ("dk", "dv") in map(tuple, map(sorted, self.gradients))
    needed = (self.dq, (2, 1)), (self.dkv, (2, 1 + both))
    if self.cores == "tcgen05" and any(
      t.stages[0] < k or t.stages[1] < v for t, (k, v) in needed
    ):
      raise ValueError(
        f"tiles.stages: found {self.dq.stages} of dq and {self.dkv.stages} of "
        "dkv, expected for 'tcgen05' two of the operand that sums read (keys, "
        "queries, and the cotangents of dv with dk), for the next tile's scores"
      )
    names = [name for kernel in self.gradients for name in kernel]
    if sorted(names) != ["dk", "dv"]:
      raise ValueError(
        f"tiles.gradients: found {self.gradients}, expected 'dk' and 'dv' once "
        "each"
      )


def for_head_dim(
  H: int, Hv: int, cores: str = "wgmma", programs: int = PROGRAMS
) -> GpuTiles:
  """Returns tile sizes that fit registers and shared memory.

  As found by `python -m kernels_pallas.inspect.gpu` for 16-bit operands.

  Args:
    H: Head dim of queries and keys.
    Hv: Head dim of values.
    cores, programs: As in `GpuTiles`.
  """
  wide = max(H, Hv)
  # With dims 192 and 256 the output cannot reuse the queries' memory, and two
  # buffers of values leave no room for its own.
  padded = {math.ceil(dim / COLUMNS) * COLUMNS for dim in (H, Hv)}
  stages = (2, 1) if padded == {192, 256} else (2, 2)
  if cores == "mma":
    return _of_mma(wide)
  if cores == "tcgen05":
    return _of_tcgen05(wide, stages, programs)
  if wide <= 64:
    return GpuTiles(
      dkv=GpuTile(2, 64), dq=GpuTile(2, 128), programs=programs
    )  # fmt: skip
  if wide <= 128:
    return GpuTiles(programs=programs)
  return GpuTiles(
    forward=GpuTile(2, 64, stages),
    dkv=GpuTile(1, 64, products="one"),
    dq=GpuTile(1, 64, products="one"),
    gradients=(("dk",), ("dv",)),
    programs=programs,
  )


def _of_tcgen05(wide: int, stages: tuple[int, int], programs: int) -> GpuTiles:
  """Tiles for Blackwell, limited by the 512 columns of tensor memory.

  The sums still read one buffer while the next tile's scores need a second one.
  """

  def tile(groups, streamed, stages=(2, 2)):
    return GpuTile(groups, streamed, stages, height=LANES)

  gradients = (("dk", "dv"),)
  if wide <= 64:
    tiles = tile(2, 128), tile(2, 64), tile(2, 64)
  elif wide <= 128:
    tiles = tile(2, 64), tile(1, 64), tile(2, 64)
  else:
    narrow = tile(1, 64, (2, 1))
    tiles = tile(1, 64, stages), narrow, narrow
    gradients = ("dk",), ("dv",)
  return GpuTiles(*tiles, gradients, cores="tcgen05", programs=programs)


def _of_mma(wide: int) -> GpuTiles:
  """Tiles for Ampere and Ada, limited by 255 registers per thread."""
  tile, narrow = GpuTile(1, 64, (1, 1)), GpuTile(1, 32, (1, 1))
  apart = (("dk",), ("dv",))
  if wide <= 64:
    return GpuTiles(tile, narrow, tile, cores="mma")
  if wide <= 128:
    return GpuTiles(tile, tile, tile, apart, cores="mma")
  return GpuTiles(tile, narrow, narrow, apart, cores="mma")
