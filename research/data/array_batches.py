"""Batches of rows that are in memory, by one gather each.

For rows of a few tokens: `pipeline.ShuffledRows` reads them one by one, which
takes longer than a small model's step. The order depends on seed and index, and
the shuffle comes before sharding by process, as there.
"""

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from research.data.packing import Row
from research.data.pipeline import ENDLESS, ShuffledRows, prefetched
from research.typing import UserError


@runtime_checkable
class GatheredRows(Protocol):
  """Rows that are read several at a time."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Row: ...

  def take(self, indices: np.ndarray) -> Row:
    """Returns a batch of these rows."""
    ...


class ShuffledBatches(ShuffledRows):
  """Base of data whose rows are `GatheredRows`.

  Subclasses define `rows`, and have fields `batch_size` and `seed`.
  """

  def training(
    self, tokenizer: Any, process: int = 0, processes: int = 1
  ) -> grain.IterDataset:
    if self.batch_size % processes:
      raise UserError(
        f"{type(self).__name__}.batch_size: found {self.batch_size}, expected a"
        f" multiple of the {processes} processes."
      )
    batches = _Batches(
      rows=self.rows(tokenizer),
      size=self.batch_size,
      seed=self.seed,
      process=process,
      processes=processes,
    )
    return prefetched(grain.MapDataset.source(batches))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Batches:
  """This process's share of each batch, by the batch's index."""

  rows: GatheredRows
  size: int
  seed: int
  process: int
  processes: int

  def __len__(self) -> int:
    return ENDLESS // self.size

  def __getitem__(self, index: int) -> Row:
    own = self.size // self.processes
    first = index * self.size + self.process * own
    count = len(self.rows)
    places = [divmod(i, count) for i in range(first, first + own)]
    chosen = [_order(self.seed, epoch, count)[i] for epoch, i in places]
    return self.rows.take(np.array(chosen))


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
  return np.random.default_rng([seed, epoch]).permutation(count)
