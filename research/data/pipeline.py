"""From documents to batches: tokenise, pack, shuffle globally, slice, batch.

The order of examples is a function of the seed and the example's index alone.
The shuffle is global and comes before the slice by process, so that the set of
examples in step k is the same for any number of processes, and the iterator's
state is one number.
"""

import dataclasses
from collections.abc import Callable, Sequence

import grain
import numpy as np

from research.data import packing
from research.data.packing import PackedRows, Row
from research.data.sources import Documents
from research.typing import UserError

Encode = Callable[[str], Sequence[int]]
RowTransform = Callable[[Row, np.random.Generator], Row]
"""A rewrite of one row; its generator depends on seed and index only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
  """What is read, and in which shape and order.

  Attributes:
    source: the documents.
    length: places in a row, T.
    batch_size: rows in a batch over all processes, B.
    seed: of the shuffle and of the transforms' generators.
    plan: how documents share rows; `packing.concatenate` or `best_fit`.
    end: a token appended to each document, if any.
    transforms: random rewrites of a row, in order; training only.
  """

  source: Documents
  length: int = 256
  batch_size: int = 4
  seed: int = 0
  plan: packing.Plan = packing.concatenate
  end: int | None = None
  transforms: tuple[RowTransform, ...] = ()

  def __post_init__(self):
    for name, low in {"length": 2, "batch_size": 1}.items():
      if getattr(self, name) < low:
        raise UserError(
          f"Pipeline.{name}: found {getattr(self, name)}, expected at least"
          f" {low}."
        )

  def rows(self, encode: Encode) -> PackedRows:
    """Returns the packed rows in the source's order."""
    tokens = packing.tokenize(self.source, encode, self.end)
    return packing.pack(tokens, self.length, self.plan)

  def training(
    self, encode: Encode, process: int = 0, processes: int = 1
  ) -> grain.IterDataset:
    """Returns endless shuffled batches; `iter()` of it can be checkpointed."""
    return shuffled(self, self.rows(encode), process, processes)

  def evaluation(self, encode: Encode, limit: int | None = None) -> list[Row]:
    """Returns all rows once, in order, in at most `limit` equal batches."""
    return in_order(self.rows(encode), self.batch_size)[:limit]


def shuffled(
  pipeline: Pipeline, rows: PackedRows, process: int = 0, processes: int = 1
) -> grain.IterDataset:
  """Returns this process's share of the endless shuffled batches.

  Args:
    pipeline: batch size, seed and transforms.
    rows: the examples.
    process: number of this process.
    processes: how many there are; they divide the batch.

  Raises:
    UserError: the batch does not divide among the processes.
  """
  if pipeline.batch_size % processes:
    raise UserError(
      f"Pipeline.batch_size: found {pipeline.batch_size}, expected a multiple"
      f" of the {processes} processes."
    )
  data = grain.MapDataset.source(rows).seed(pipeline.seed).shuffle().repeat()
  for transform in pipeline.transforms:
    data = data.random_map(transform)
  data = data[process::processes].batch(pipeline.batch_size // processes)
  # One thread: a row is a few copies, and the cores belong to XLA.
  return data.to_iter_dataset(
    grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
  )


def in_order(rows: PackedRows, batch_size: int) -> list[Row]:
  """Returns all rows in batches of one shape, the last one padded."""
  padding = [packing.blank_row(rows.length)] * (-len(rows) % batch_size)
  full = [rows[i] for i in range(len(rows))] + padding
  return [
    {k: np.stack([row[k] for row in full[i : i + batch_size]]) for k in full[i]}
    for i in range(0, len(full), batch_size)
  ]
