"""Tile sizes of the GPU kernels: what a block of threads holds and streams.

A warpgroup (128 threads) computes 64 rows, the height of a `wgmma`, or the 128
of a `tcgen05.mma`. The rows of all warpgroups of a block stay in shared memory,
while tiles of the other side (keys for queries, queries for keys) pass through
`stages` buffers. What bounds the sizes are 232,448 bytes of shared memory a
block, 65,536 registers a multiprocessor, and with `tcgen05` the 512 columns of
tensor memory, where products and sums are.
"""

import dataclasses
import math

ROWS = 64
"""Rows of a warpgroup: the M of `wgmma`."""

LANES = 128
"""Rows of a warpgroup with `tcgen05`: the lanes of tensor memory."""

STREAMED = 32
"""Tokens of a tile that passes are a multiple, of `ROWS` for `wgmma`."""

COLUMNS = 64
"""Head dims are padded to a multiple: a swizzled row of 128 bytes."""

SHARED_BYTES = 232_448
"""Shared memory that a block of Hopper or Blackwell may ask for."""

OPERANDS = ("registers", "shared")
CORES = ("wgmma", "mma", "tcgen05")
PRODUCTS = ("both", "one")

# Registers a thread of (a computing, the copying) warpgroup, by how many
# compute; a multiprocessor has 65,536, in units of 8 a thread.
REGISTERS = {2: (240, 24), 3: (160, 32)}

PROGRAMS = 132
"""Multiprocessors of an H100 SXM, H200 or GH200."""


def height(cores: str) -> int:
  """Rows of a warpgroup, by `GpuTiles.cores`."""
  return LANES if cores == "tcgen05" else ROWS


@dataclasses.dataclass(frozen=True)
class GpuTile:
  """Sizes of one kernel.

  Attributes:
    groups: Warpgroups that compute, of `height` rows each; one more copies.
    streamed: Tokens of a tile of the side that passes by, a multiple of 32.
    stages: Buffers of its two operands (keys and values, or queries and
      cotangents).
    products: How a backward kernel issues its two products of a tile: 'both'
      at once, or 'one' after the other, which holds fewer registers. Not of
      'tcgen05', whose products are not in registers.
    height: Rows of a warpgroup: 64, of 'tcgen05' 128.
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
    """Tokens of the side that stays."""
    return self.groups * self.height


@dataclasses.dataclass(frozen=True)
class GpuTiles:
  """Tiles of every kernel.

  Attributes:
    forward: Queries stay, keys pass.
    dkv: Keys stay, queries pass.
    dq: Queries stay, keys pass.
    gradients: What a kernel over queries sums: ('dk', 'dv') both in one;
      ('dk',), ('dv',) each in its own, where registers do not hold both.
    operand: Where the left operand of the second matmul comes from:
      'registers', which is fast, or 'shared' memory, which the GPU interpreter
      can run. With 'tcgen05' it comes from tensor memory, if that has room.
    cores: The instruction of the tensor cores: 'wgmma' of Hopper, 'tcgen05' of
      Blackwell, or 'mma' of Ampere and Ada, whose kernels have one group.
    programs: Blocks of threads of a kernel that takes tile after tile: as many
      as there are multiprocessors, each of which has room for one. Those of
      'mma' take one tile.
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
  """Tiles that fit registers and shared memory.

  As `python -m kernels_pallas.inspect.gpu` finds them for 16-bit operands.

  Args:
    H: Head dim of queries and keys.
    Hv: Head dim of values.
    cores, programs: As of `GpuTiles`.
  """
  wide = max(H, Hv)
  # Of 192 and 256 the output has no queries' place to take, and two buffers of
  # values leave it no room of its own.
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
  """Of Blackwell, where 512 columns of tensor memory are what there is least.

  What a tile's next scores wait for is a second buffer beside the one that the
  sums still read.
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
  """Of Ampere and Ada, whose 255 registers a thread are what there is least."""
  tile, narrow = GpuTile(1, 64, (1, 1)), GpuTile(1, 32, (1, 1))
  apart = (("dk",), ("dv",))
  if wide <= 64:
    return GpuTiles(tile, narrow, tile, cores="mma")
  if wide <= 128:
    return GpuTiles(tile, tile, tile, apart, cores="mma")
  return GpuTiles(tile, narrow, narrow, apart, cores="mma")
