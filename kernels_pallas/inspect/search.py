"""Finds the tiles of our attention kernels by their schedules alone.

The parts that are worked on decide most, the tiles that are fetched the rest.
So parts are tried in a tile that compiles quickly, then tiles for the best of
them. What does not compile, or does not fit, is not chosen. A schedule counts
a cycle a bundle, or what memory takes where that is more (kernels.md 12.1).
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator

from kernels_pallas.flash_attention.tpu import tpu_tile_sizes
from kernels_pallas.inspect import report
from kernels_pallas.inspect.programs import Job
from kernels_pallas.inspect.report import Measurement

QUICK = 1024
PARTS = ((256, 128), (128, 128), (128, 256), (256, 256), (512, 256))
TILES = ((2048, 2048), (2048, 1024), (1024, 2048), (1024, 1024), (1024, 512),
         (512, 1024), (512, 512), (256, 512), (256, 256))  # fmt: skip
MOST = 2
"""Tiles that are tried for the best parts: the largest that fit."""


def search(
  job: Job, tell: Callable[[tuple[int, ...], Measurement | str], None]
) -> Measurement | None:
  """The measurement of the best blocks for a job of our attention, or None.

  Args:
    job: Its blocks and length are not used.
    tell: Told of each blocks that were tried: a measurement or a refusal.
  """

  def best(candidates: Iterator[tuple[int, ...]], most: int):
    found = []
    for blocks in candidates:
      try:
        one = report.measure(at(job, blocks))
      except ValueError as problem:
        tell(blocks, str(problem))
        continue
      tell(blocks, one)
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
  larger = best(tiles, MOST)
  return min(filter(None, (parts, larger)), key=lambda m: m.cycles)


def at(job: Job, blocks: tuple[int, ...]) -> Job:
  """The job at other blocks, long enough for a steady state."""
  return dataclasses.replace(
    job, blocks=tuple(blocks), length=4 * max(blocks[:2])
  )


def write(
  found: Measurement, path: pathlib.Path = tpu_tile_sizes.TABLE
) -> None:
  """Writes the blocks of a measurement where `tpu_tile_sizes.for_device` reads them.

  Args:
    found: Of our attention.
    path: Of the table.
  """
  job, table = found.job, json.loads(path.read_text())
  row = table[job.chip.kind][job.dtype][str(job.head_dim)]
  row[name(job)] = list(job.blocks)
  path.write_text(_text(table))


def name(job: Job) -> str:
  """Which tile of `tpu_tile_sizes.Tiles` a job measures."""
  names = {("backward", "split"): "dq", ("backward", "fused"): "dkv"}
  return names.get((job.direction, job.backward), "forward")


def _text(table) -> str:
  """The table as JSON, a head dim a line."""

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
