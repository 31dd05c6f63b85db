"""Batches of a few shapes, each compiled once: a bucket is rows of one shape.

Each bucket has rows of its own, shuffled and repeated by themselves, and a
schedule says which bucket a step takes its batch from: in proportion to the
buckets' batches, by index arithmetic alone. So step k has the same bucket and
the same rows in every process and after every resumption, and the position in
all of it is one number, as for rows of one shape (`research.data.pipeline`).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from research.data import packing, pipeline
from research.data.packing import Row, Rows

Shapes = Mapping[str, jax.ShapeDtypeStruct]
"""Shapes and dtypes of a batch's arrays."""


class BucketRows(NamedTuple):
  """The rows of a bucket.

  Attributes:
    units: rows that stay together, as arrays with a leading axis: `[G, T]` of
      text, and whatever G of its rows share as `[1, ...]`.
    size: units in a batch over all processes.
  """

  units: Rows
  size: int


@dataclasses.dataclass(frozen=True, eq=False)
class BucketedBatches:
  """Endless batches, each of one of few shapes; `iter()` can be checkpointed.

  Attributes:
    batches: this process's share of each.
    shapes: of this process's share of a batch, for each bucket.
    report: what is in the buckets, and what in none, as plain values.
  """

  batches: grain.IterDataset
  shapes: tuple[Shapes, ...]
  report: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __iter__(self) -> Iterator[Row]:
    return iter(self.batches)


def training(
  buckets: Sequence[BucketRows],
  seed: int = 0,
  process: int = 0,
  processes: int = 1,
  threads: int = 1,
  report: Mapping[str, Any] | None = None,
) -> BucketedBatches:
  """Returns endless shuffled batches of all buckets.

  Args:
    buckets: none of them empty.
    seed: of the shuffles.
    processes: number of processes; divides the units of every batch.
    threads: that make units, ahead of time.
    report: see `BucketedBatches`.

  Raises:
    UserError: a batch does not divide among the processes.
  """
  streams = []
  for i, bucket in enumerate(buckets):
    own = np.random.SeedSequence([seed, i]).generate_state(1)[0]
    stream = pipeline.shuffled(bucket.units, int(own))
    streams.append(
      pipeline.batches(stream, bucket.size, process, processes, _join)
    )
  mixed = grain.MapDataset.mix(
    streams, [len(bucket.units) / bucket.size for bucket in buckets]
  )
  return BucketedBatches(
    pipeline.prefetched(mixed, threads),
    tuple(_shapes(bucket, processes) for bucket in buckets),
    report or {},
  )


def evaluation(
  buckets: Sequence[BucketRows], limit: int | None = None
) -> list[Row]:
  """Returns all rows once, each bucket's last batch padded.

  Buckets alternate in proportion, so that any number of batches has a share of
  each.

  Args:
    buckets: as for `training`.
    limit: of batches; None for all.
  """
  places = []
  for number, bucket in enumerate(buckets):
    count = -(-len(bucket.units) // bucket.size)
    places += [((i + 0.5) / count, number, i) for i in range(count)]
  return [_batch(buckets[number], i) for _, number, i in sorted(places)[:limit]]


def _batch(bucket: BucketRows, index: int) -> Row:
  first = index * bucket.size
  last = min(first + bucket.size, len(bucket.units))
  units = [bucket.units[i] for i in range(first, last)]
  units += [packing.padding_like(units[0])] * (bucket.size - len(units))
  return _join(units)


def _join(units: Sequence[Row]) -> Row:
  return {k: np.concatenate([unit[k] for unit in units]) for k in units[0]}


def _shapes(bucket: BucketRows, processes: int) -> Shapes:
  share = bucket.size // processes
  return {
    k: jax.ShapeDtypeStruct((share * x.shape[0], *x.shape[1:]), x.dtype)
    for k, x in bucket.units[0].items()
  }
