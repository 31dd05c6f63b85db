"""Tile sizes of the TPU kernels: what is fetched, and what is worked on.

A tile of `q` queries and `kv` keys is fetched into VMEM at a time: the larger,
the fewer bytes are fetched for each operation. It is worked on in parts of
`q_part` queries and `kv_part` keys, whose scores stay in registers (256 x 128
in float32 is 32 of the 64).
"""

import dataclasses

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


def for_device(kind: str) -> Tiles:
  """The tiles with the fewest bundles on a kind of device.

  As `python -m kernels_pallas.inspect --blocks=` finds them for D = 128 in
  bf16.

  Args:
    kind: As JAX calls it: 'TPU v5 lite', 'TPU v5', 'TPU v6 lite', ...
  """
  if kind == "TPU v5 lite":
    return Tiles(dkv=Tile(2048, 1024, 512, 256))
  return Tiles()


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
