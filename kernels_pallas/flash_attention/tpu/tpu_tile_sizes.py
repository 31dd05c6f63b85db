"""Tile sizes of the TPU kernels: what is fetched, and what is worked on.

A tile of `q` queries and `kv` keys is fetched into VMEM at a time: the larger,
the fewer bytes are fetched for each operation. It is worked on in parts of
`q_part` queries and `kv_part` keys, whose scores stay in registers (256 x 128
in float32 is 32 of the 64).
"""

import dataclasses
import functools
import json
import pathlib

TABLE = pathlib.Path(__file__).parent / "tiles.json"
"""Device kind -> dtype -> head dim -> name of a tile in `Tiles` -> sizes."""

SMALLEST = "TPU v4"
"""The kind with the least memory for tiles."""

LANES = 128

BACKWARDS = ("auto", "split", "fused")


@dataclasses.dataclass(frozen=True)
class Tile:
  """Sizes in tokens; the parts divide the tile.

  Attributes:
    q: Queries fetched at a time.
    kv: Keys fetched at a time.
    q_part: Queries worked on at a time.
    kv_part: Keys worked on at a time.
  """

  q: int = 2048
  kv: int = 2048
  q_part: int = 256
  kv_part: int = 128

  def __post_init__(self):
    sizes = dataclasses.astuple(self)
    if min(sizes) < 1 or self.q % self.q_part or self.kv % self.kv_part:
      raise ValueError(
        f"tile: found {self}, expected positive sizes, and parts that divide "
        "their tile"
      )


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Tiles of every kernel.

  Attributes:
    forward: Of the forward kernel.
    dkv: Of the kernel for dk and dv; of the fused one, too.
    dq: Of the kernel for dq.
    backward: 'split' runs a kernel for dk and dv and one for dq (7 matmuls a
      tile); 'fused' one for all (5 matmuls), whose parts of dq pass through
      memory, once for each tile of keys; 'auto' is 'fused' while they are few.
  """

  forward: Tile = Tile()
  dkv: Tile = Tile(2048, 1024, 256, 256)
  dq: Tile = Tile(1024, 1024, 256, 256)
  backward: str = "auto"

  def __post_init__(self):
    if self.backward not in BACKWARDS:
      raise ValueError(
        f"tiles.backward: found {self.backward!r}, expected one of {BACKWARDS}"
      )


def for_device(
  kind: str, head_dim: int = 128, dtype: str = "bfloat16", bias: bool = False
) -> Tiles:
  """The tiles with the fewest bundles that fit, by the table `tiles.json`.

  `python -m kernels_pallas.inspect --search` finds and writes them.

  Args:
    kind: As JAX calls it: 'TPU v5 lite', 'TPU v5', 'TPU v6 lite', ... One that
      the table does not know has the tiles of the smallest memory.
    head_dim: Of q, k and v: the larger of them. One that the table does not
      know has the tiles of the next in it, and beyond the last smaller ones.
    dtype: 'bfloat16', else the tiles are those of 'float32'.
    bias: Whether there is one, whose tiles have to fit too (2048 x 1024 of
      float32, twice, are 16 MiB: all of a v4's).
  """
  table = _table()
  own = table.get(kind, table[SMALLEST])
  rows = own["bfloat16" if dtype == "bfloat16" else "float32"]
  dims = sorted(map(int, rows))
  row = rows[str(next((d for d in dims if d >= head_dim), dims[-1]))]
  shrink = -(-head_dim // dims[-1])
  if bias and own is table[SMALLEST]:
    shrink *= 2
  return Tiles(
    **{name: _smaller(Tile(*sizes), shrink) for name, sizes in row.items()}
  )


@functools.cache
def _table():
  return json.loads(TABLE.read_text())


def _smaller(tile: Tile, times: int) -> Tile:
  """The tile with about 1 / `times` of its queries and keys."""
  q, kv = (
    max(1, size // part // times) * part
    for size, part in ((tile.q, tile.q_part), (tile.kv, tile.kv_part))
  )
  return Tile(q, kv, tile.q_part, tile.kv_part)


def fit(tile: Tile, T: int, S: int) -> Tile:
  """The tile shrunk to T queries and S keys, with little padding.

  Args:
    tile: Wanted.
    T: Queries a row.
    S: Keys a row.

  Returns:
    A tile of which whole numbers cover T and S with less than one part of
    padding a tile.
  """
  q, q_part = _fit(T, tile.q, tile.q_part)
  kv, kv_part = _fit(S, tile.kv, tile.kv_part)
  return Tile(q, kv, q_part, kv_part)


def _fit(length: int, block: int, part: int) -> tuple[int, int]:
  part = min(part, _up(length, min(part, LANES)))
  count = -(-length // block)
  return _up(-(-length // count), part), part


def _up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple
