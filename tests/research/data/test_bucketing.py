"""Batches of several shapes: one schedule, whoever reads it and from where."""

import dataclasses

import numpy as np
import pytest

from research.data import bucketing
from research.data.bucketing import BucketRows
from research.typing import UserError


@dataclasses.dataclass(frozen=True)
class Numbered:
  """Units of `rows` rows of `length`, each full of its number."""

  count: int
  rows: int
  length: int

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    number = range(self.count)[index]
    whole = np.full((self.rows, self.length), number, np.int32)
    return {"tokens": whole, "segments": whole * 0, "pixels": whole[:1, :2]}


BUCKETS = [BucketRows(Numbered(12, 1, 8), 4), BucketRows(Numbered(10, 2, 6), 2)]


def first(data, count):
  return [batch for batch, _ in zip(data, range(count), strict=False)]


def test_buckets_take_turns_in_proportion_and_lose_nothing():
  """An epoch is three batches of the first bucket and five of the second."""
  data = bucketing.training(BUCKETS, seed=1)
  batches = first(data, 32)
  shapes = [batch["tokens"].shape for batch in batches]
  assert set(shapes) == {(4, 8), (4, 6)}
  for end in (8, 16, 24, 32):
    assert abs(shapes[:end].count((4, 8)) - 3 * end / 8) <= 1
  for shape, count, rows in (((4, 8), 12, 1), ((4, 6), 10, 2)):
    own = [x["tokens"] for x in batches if x["tokens"].shape == shape]
    numbers = np.concatenate(own)[::rows, 0][:count]
    assert sorted(numbers) == list(range(count))
  for batch, shape in zip(batches[:2], data.shapes, strict=False):
    assert {k: x.shape for k, x in batch.items()} in [
      {k: x.shape for k, x in shape.items()} for shape in data.shapes
    ]
  other = first(bucketing.training(BUCKETS, seed=2), 8)
  assert any(
    (a["tokens"] != b["tokens"]).any()
    for a, b in zip(batches, other, strict=False)
  )


def test_two_processes_have_the_same_bucket_and_each_its_rows():
  whole = first(bucketing.training(BUCKETS), 12)
  parts = [
    first(bucketing.training(BUCKETS, process=i, processes=2), 12)
    for i in range(2)
  ]
  for batch, *halves in zip(whole, *parts, strict=True):
    for name, x in batch.items():
      np.testing.assert_array_equal(
        x, np.concatenate([half[name] for half in halves])
      )
  with pytest.raises(UserError, match="expected a multiple of the 4 processes"):
    bucketing.training(BUCKETS, processes=4)


def test_a_position_in_all_buckets_is_one_number():
  data = bucketing.training(BUCKETS, threads=2)
  batches = iter(data)
  first(batches, 7)
  state = batches.get_state()
  expected = first(batches, 5)
  again = iter(data)
  again.set_state(state)
  for one, other in zip(expected, first(again, 5), strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])
  assert len(state) == 1


def test_evaluation_has_every_row_once_and_a_share_of_each_bucket():
  batches = bucketing.evaluation(BUCKETS)
  for length, count, rows in ((8, 12, 1), (6, 10, 2)):
    own = [x for x in batches if x["tokens"].shape[1] == length]
    assert all(x["tokens"].shape[0] == 4 for x in own)
    numbers = np.concatenate([x["tokens"] for x in own])[:, 0]
    real = np.concatenate([x["segments"] for x in own])[:, 0] >= 0
    assert list(numbers[real][::rows]) == list(range(count))
  assert len(batches) == 3 + 5
  lengths = [x["tokens"].shape[1] for x in bucketing.evaluation(BUCKETS, 3)]
  assert sorted(lengths) == [6, 6, 8]


def test_the_last_batch_of_a_bucket_is_padded():
  (batch,) = bucketing.evaluation([BucketRows(Numbered(3, 2, 4), 5)])
  assert batch["tokens"].shape == (10, 4) and batch["pixels"].shape == (5, 2)
  np.testing.assert_array_equal(batch["segments"][:, 0], [0] * 6 + [-1] * 4)
