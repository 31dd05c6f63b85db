"""Finds tile sizes for our TPU attention kernels from their schedules alone.

The parts that are computed matter most, then the tiles that are fetched. So
parts are tried in a tile that compiles quickly, then tiles for the best of
them. Tiles that do not compile or do not fit are skipped. A schedule costs a
cycle per bundle, or the memory's cycles if these are more
(kernels_pallas/MATH.md 7).
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator

from kernels_pallas.flash_attention.tpu import tile_sizes
from kernels_pallas.inspect import report
from kernels_pallas.inspect.programs import Job
from kernels_pallas.inspect.report import Measurement

QUICK = 1024
PARTS = ((256, 128), (128, 128), (128, 256), (256, 256), (512, 256))
TILES = ((2048, 2048), (2048, 1024), (1024, 2048), (1024, 1024), (1024, 512),
         (512, 1024), (512, 512), (256, 512), (256, 256))  # fmt: skip
MAX_TILES = 2
"""Tiles to try for the best parts: the largest that fit."""


def search(
  job: Job, on_result: Callable[[tuple[int, ...], Measurement | str], None]
) -> Measurement | None:
  """Returns the measurement with the best blocks for our attention, or None.

  Args:
    job: Its blocks and length are ignored.
    on_result: Called with each blocks tried, and a measurement or an error
      message.
  """

  def best(candidates: Iterator[tuple[int, ...]], most: int):
    found = []
    for blocks in candidates:
      try:
        one = report.measure(with_blocks(job, blocks))
      except ValueError as problem:
        on_result(blocks, str(problem))
        continue
      on_result(blocks, one)
      found.append(one)
      if len(found) == most:
        break
    return min(found, key=lambda m: m.cycles, default=None)

  for tile in ((QUICK, QUICK), (512, 512)):
    parts = best(((*tile, *part) for part in PARTS), len(PARTS))
    if parts is not None:
      break
  else:
    return None
  tiles = (
    (q, kv, *parts.job.blocks[2:])
    for q, kv in TILES
    if (q, kv) != tile and q % parts.job.blocks[2] == 0
  )
  larger = best(tiles, MAX_TILES)
  return min(filter(None, (parts, larger)), key=lambda m: m.cycles)


def with_blocks(job: Job, blocks: tuple[int, ...]) -> Job:
  """Returns the job at other blocks, long enough for a steady state."""
  return dataclasses.replace(
    job, blocks=tuple(blocks), length=4 * max(blocks[:2])
  )


def write_table(
  found: Measurement, path: pathlib.Path = tile_sizes.TABLE
) -> None:
  """Writes a measurement's blocks to the table of `tile_sizes.for_device`.

  Args:
    found: Measurement of our attention.
    path: Path of the table.
  """
  job, table = found.job, json.loads(path.read_text())
  row = table[job.chip.kind][job.dtype][str(job.head_dim)]
  row[tile_name(job)] = list(job.blocks)
  path.write_text(_text(table))


def tile_name(job: Job) -> str:
  """Returns the name in `tile_sizes.Tiles` of the tile that a job measures."""
  names = {("backward", "split"): "dq", ("backward", "fused"): "dkv"}
  return names.get((job.direction, job.backward), "forward")


def _text(table) -> str:
  """Formats the table as JSON, one head dim per line."""

  def block(rows: list[str], indent: int) -> str:
    space = "\n" + " " * indent
    return "{" + space + f",{space}".join(rows) + space[:-2] + "}"

  kinds = []
  for kind, dtypes in table.items():
    rows = [
      f'"{dtype}": '
      + block([f'"{n}": {json.dumps(row)}' for n, row in dims.items()], 6)
      for dtype, dims in dtypes.items()
    ]
    kinds.append(f'"{kind}": {block(rows, 4)}')
  return block(kinds, 2) + "\n"
