"""Mixtures: proportions, determinism, any number of processes, resumption."""

import dataclasses

import chex
import numpy as np
import pytest

from research.data import pipeline
from research.data.examples import Example
from research.data.sources import pairs, synthetic
from research.typing import UserError


@dataclasses.dataclass(frozen=True)
class Same:
  """Documents that repeat one token and end with their number."""

  token: int
  count: int = 10

  def examples(self, tokenizer):
    return [
      Example(np.array([self.token, self.token, i]), np.ones(3, bool))
      for i in range(self.count)
    ]


def part(token, count=10, **changes):
  return pipeline.Pipeline(source=Same(token, count), length=3, **changes)


def mixture(weights, batch_size=4, counts=(10, 7, 3)):
  parts = tuple(
    part(i, n) for i, n in zip(range(len(weights)), counts, strict=False)
  )
  return pipeline.Mixture(parts=parts, weights=weights, batch_size=batch_size)


def take(data, n):
  found = iter(data)
  return [next(found) for _ in range(n)]


def order(batches):
  return np.concatenate([b["tokens"][:, 0] for b in batches])


@pytest.mark.parametrize(
  "weights", [(1, 1), (0.7, 0.3), (5, 3, 2), (0.9, 0.05, 0.05), (50, 1)]
)
@pytest.mark.sample(5)
def test_every_prefix_has_the_proportions(weights):
  seen = order(take(mixture(weights).training(None), 130))
  shares = np.array(weights) / sum(weights)
  counts = np.cumsum(seen[:, None] == np.arange(len(weights)), 0)
  steps = np.arange(1, len(seen) + 1)[:, None]
  # Index arithmetic, not draws: never more than a row of each part away.
  assert np.abs(counts - steps * shares).max() <= len(weights)


def test_each_part_is_seen_evenly():
  batches = take(mixture((0.5, 0.3, 0.2)).training(None), 50)
  rows = np.concatenate([b["tokens"] for b in batches])
  for i, n in enumerate((10, 7, 3)):
    counts = np.bincount(rows[rows[:, 0] == i][:, 2], minlength=n)
    assert counts.max() - counts.min() <= 1


def test_determined_by_seeds():
  first, again = (take(mixture((2, 1)).training(None), 9) for _ in range(2))
  chex.assert_trees_all_equal(first, again)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.sample(2)
def test_processes_share_each_global_batch(processes):
  data = mixture((0.5, 0.3, 0.2), batch_size=8)
  alone = take(data.training(None), 12)
  shares = [
    take(data.training(None, p, processes), 12) for p in range(processes)
  ]
  for step, batch in enumerate(alone):
    rows = np.concatenate([s[step]["tokens"] for s in shares])
    assert rows.shape == batch["tokens"].shape
    assert sorted(map(tuple, rows)) == sorted(map(tuple, batch["tokens"]))


def test_resume_continues_exactly():
  whole = take(mixture((2, 1)).training(None), 9)
  begun = iter(mixture((2, 1)).training(None))
  for _ in range(4):
    next(begun)
  resumed = iter(mixture((2, 1)).training(None))
  resumed.set_state(begun.get_state())
  chex.assert_trees_all_equal(whole[4:], [next(resumed) for _ in range(5)])


def test_transforms_belong_to_their_part():
  def marked(row, rng):
    return {**row, "tokens": row["tokens"] + 100 * rng.integers(1, 5)}

  data = pipeline.Mixture(
    parts=(part(0), part(1, transforms=(marked,))), weights=(1, 1)
  )
  found = [take(data.training(None), 10) for _ in range(2)]
  seen = order(found[0])
  assert (seen[seen % 100 == 0] == 0).all() and (seen[1::2] > 100).all()
  chex.assert_trees_all_equal(*found)


def test_mixtures_of_mixtures_and_evaluation():
  inner = mixture((1, 1))
  outer = pipeline.Mixture(parts=(inner, part(7)), weights=(2, 2), batch_size=4)
  seen = order(take(outer.training(None), 50))
  assert [(seen == i).sum() for i in (0, 1, 7)] == [50, 50, 100]
  batches = outer.evaluation(None)
  counts = np.bincount(
    np.concatenate([b["tokens"][b["weights"].any(-1), 0] for b in batches]),
    minlength=8,
  )
  assert counts.tolist() == [10, 7, 0, 0, 0, 0, 0, 10]
  # Where it is limited, no part is left out, those of inner mixtures included.
  for limit in range(1, 7):
    some = order(outer.evaluation(None, limit))
    for token, count in ((0, 10), (1, 7), (7, 10)):
      share = count / 27 * len(some)
      assert abs((some == token).sum() - share) <= 1


@pytest.mark.parametrize(
  ("weights", "words"),
  [
    ((1, 0), "found 0, expected above 0: remove a part"),
    ((1,), "found 2 parts and 1 weights"),
    ((1, 1e9), "no ratio above 10,000"),
  ],
)
def test_weights_that_are_none(weights, words):
  with pytest.raises(UserError, match=words):
    pipeline.Mixture(parts=(part(0), part(1)), weights=weights)


def test_parts_have_to_have_one_shape():
  longer = pipeline.Pipeline(source=synthetic.Copy(), length=64)
  data = pipeline.Mixture(parts=(part(0), longer), weights=(1, 1))
  for use in (data.training, data.evaluation):
    with pytest.raises(UserError, match="rows of part 1 have shapes"):
      use(None)


@dataclasses.dataclass(frozen=True)
class Answers:
  """Distinguishable pairs, with answers from position 2 on."""

  sizes: tuple = (4, 6, 5)

  def pairs(self, tokenizer):
    def one(first, n):
      return Example(np.arange(first, first + n), np.arange(n) >= 2)

    return [
      (one(10 * i, n), one(10 * i + 100, n - 1))
      for i, n in enumerate(self.sizes)
    ]


def test_pairs_stand_beside_each_other():
  data = pairs.Pairs(source=Answers(), length=6, batch_size=2)
  batches = data.evaluation(None)
  assert [b["tokens"].shape for b in batches] == [(2, 2, 6)] * 2
  tokens = np.concatenate([b["tokens"] for b in batches])
  weights = np.concatenate([b["weights"] for b in batches])
  targets = np.concatenate([b["targets"] for b in batches])
  assert tokens[1].tolist() == [
    [10, 11, 12, 13, 14, 15],
    [110, 111, 112, 113, 114, 0],
  ]
  assert targets[1][weights[1] > 0].tolist() == [12, 13, 14, 15, 112, 113, 114]
  assert weights[3].sum() == 0  # padding
  assert (batches[1]["segments"][1] == -1).all()
  found = take(data.training(None), 3)
  for row in np.concatenate([b["tokens"] for b in found]):
    assert row[1, 0] == row[0, 0] + 100


def test_pairs_that_are_too_long_are_named_or_dropped():
  data = pairs.Pairs(source=Answers(), length=5, batch_size=1)
  with pytest.raises(UserError, match="1 of 3 pairs do not .* pair 1 has 6"):
    data.rows(None)
  with pytest.warns(RuntimeWarning, match="1 of 3 pairs are longer than 5 "):
    kept = dataclasses.replace(data, longer="drop").rows(None)
  assert [kept[i]["tokens"][0, 0] for i in range(len(kept))] == [0, 20]
  with pytest.raises(UserError, match="3 of 3 pairs"):
    dataclasses.replace(data, longer="drop", length=3).rows(None)
