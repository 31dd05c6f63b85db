"""Batches: deterministic, resumable, independent of the process count."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from research.data import examples, packing, pipeline
from research.data.sources.synthetic import Copy
from research.text.special_tokens import SpecialTokens
from research.typing import UserError


@dataclasses.dataclass(frozen=True)
class Numbers:
  """Distinguishable documents."""

  count: int = 23

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    return chr(ord("A") + index) * 6


class Letters:
  """A tokenizer whose ids are character codes."""

  def encode(self, text):
    return [ord(c) for c in text]


LETTERS = Letters()


def jitter(row, rng):
  return {**row, "noise": rng.integers(0, 2**31, 1)}


DATA = pipeline.Pipeline(
  source=Numbers(), length=6, batch_size=4, seed=3, transforms=(jitter,)
)


@pytest.mark.parametrize(
  "own, changes, want",
  [
    (SpecialTokens((1,), (2,), True), {}, ((1,), (2,), True)),
    (SpecialTokens((1,), (2,), False), {}, ((1,), (2,), False)),
    (SpecialTokens((1,), (2,), True), dict(begin=None), ((), (2,), False)),
    (SpecialTokens((1,), (2,), True), dict(end=None), ((1,), (), True)),
    (SpecialTokens((1,), (), True), dict(begin=7, end=8), ((7,), (8,), False)),
    (SpecialTokens((1,), (), True), dict(every_row=False), ((1,), (), False)),
    (SpecialTokens(), dict(begin=7, every_row=True), ((7,), (), True)),
    (SpecialTokens(), {}, ((), (), False)),
  ],
)
def test_documents_and_rows_begin_as_the_tokenizer_says(own, changes, want):
  """Unless the pipeline overrides it; for all rows of all plans."""

  class Around(Letters):
    special = own

  begin, end, every_row = want
  for plan in (packing.concatenate, packing.best_fit, packing.one_per_row):
    data = dataclasses.replace(DATA, plan=plan, **changes)
    rows = data.rows(Around())
    assert data.special_tokens(Around()) == SpecialTokens(*want)
    for row in (rows[i] for i in range(len(rows))):
      fresh = row["tokens"][row["positions"] == 0]
      if every_row:
        assert (fresh == begin).all()
    found = [rows[i] for i in range(len(rows))]
    learned = [r["targets"][r["weights"] > 0] for r in found]
    learned = np.concatenate(learned).tolist()
    assert learned.count(ord("C")) == 6 - (not begin)
    assert [learned.count(t) for t in end] == [23 for _ in end]
    if not every_row:
      tokens = np.concatenate([r["tokens"] for r in found]).tolist()
      assert [tokens.count(t) for t in begin] == [23 for _ in begin]


def take(data, n):
  found = iter(data)
  return [next(found) for _ in range(n)]


def test_same_seed_same_batches():
  first, second = (
    take(DATA.training(LETTERS), 8),
    take(DATA.training(LETTERS), 8),
  )
  chex.assert_trees_all_equal(first, second)
  other = take(dataclasses.replace(DATA, seed=4).training(LETTERS), 8)
  assert not all(
    np.array_equal(a["tokens"], b["tokens"])
    for a, b in zip(first, other, strict=True)
  )


def test_an_epoch_is_a_permutation_and_the_next_one_differs():
  rows = [b["tokens"][:, 0] for b in take(DATA.training(LETTERS), 23)]
  epochs = np.concatenate(rows).reshape(4, 23)
  for epoch in epochs:
    assert sorted(epoch) == list(range(65, 65 + 23))
  assert not np.array_equal(epochs[0], epochs[1])


def test_resume_continues_exactly():
  whole = take(DATA.training(LETTERS), 9)
  begun = iter(DATA.training(LETTERS))
  for _ in range(4):
    next(begun)
  resumed = iter(DATA.training(LETTERS))
  resumed.set_state(begun.get_state())
  chex.assert_trees_all_equal(whole[4:], [next(resumed) for _ in range(5)])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_each_global_batch(processes):
  """Row by row: the global batch does not depend on the processes."""
  alone = take(DATA.training(LETTERS), 6)
  parts = [
    take(DATA.training(LETTERS, p, processes), 6) for p in range(processes)
  ]
  for step, batch in enumerate(alone):
    for name, rows in batch.items():
      found = np.concatenate([part[step][name] for part in parts])
      np.testing.assert_array_equal(found, rows)


def test_the_place_is_the_same_for_any_number_of_processes():
  alone, half = iter(DATA.training(LETTERS)), iter(DATA.training(LETTERS, 1, 2))
  for _ in range(7):
    next(alone), next(half)
  assert alone.get_state() == half.get_state()
  half.set_state(alone.get_state())
  chex.assert_trees_all_equal(
    next(half), jax.tree.map(lambda x: x[2:], next(alone))
  )


def test_noise_belongs_to_the_example_not_to_its_batch():
  wide = take(dataclasses.replace(DATA, batch_size=8).training(LETTERS), 3)
  slim = take(dataclasses.replace(DATA, batch_size=2).training(LETTERS), 12)
  wide, slim = (
    np.concatenate([b["noise"] for b in found]) for found in (wide, slim)
  )
  np.testing.assert_array_equal(wide, slim)


def test_evaluation_sees_every_row_once_in_equal_batches():
  batches = DATA.evaluation(LETTERS)
  assert {b["tokens"].shape for b in batches} == {(4, 6)}
  rows = DATA.rows(LETTERS)
  got = np.concatenate([b["tokens"] for b in batches])
  weights = np.concatenate([b["weights"] for b in batches])
  np.testing.assert_array_equal(
    got[: len(rows)], [rows[i]["tokens"] for i in range(len(rows))]
  )
  assert weights[len(rows) :].sum() == 0
  assert weights.sum() == 23 * 5
  assert len(DATA.evaluation(LETTERS, limit=2)) == 2


def test_batches_of_one_row():
  wide = take(DATA.training(LETTERS), 6)
  slim = take(dataclasses.replace(DATA, batch_size=1).training(LETTERS), 24)
  for key in ("tokens", "noise"):
    np.testing.assert_array_equal(
      np.concatenate([b[key] for b in wide]),
      np.concatenate([b[key] for b in slim]),
    )


def test_documents_may_begin_and_end_with_a_token():
  data = dataclasses.replace(DATA, length=8, begin=7, end=9)
  rows = data.rows(LETTERS)
  assert len(rows) == 23
  assert rows[0]["tokens"].tolist() == [7, *[65] * 6, 9]
  assert rows[0]["weights"].sum() == 7


def test_batch_must_divide_among_processes():
  with pytest.raises(UserError, match="multiple of the 3 processes"):
    DATA.training(LETTERS, 0, 3)


class Conversations:
  """Three, whose answers are the last two tokens of six."""

  def examples(self, tokenizer):
    del tokenizer
    mask = np.array([0, 0, 0, 0, 1, 1], bool)
    return [examples.Example(np.arange(6, dtype=np.int32), mask)] * 3


def test_answers_apart_from_their_questions_are_warned_of(recwarn):
  """Rows of 10 end within the second conversation of 6 tokens."""
  data = pipeline.Pipeline(source=Conversations(), length=10)
  with pytest.warns(RuntimeWarning, match="1 of 3 reach over a row's"):
    data.rows(LETTERS)
  recwarn.clear()
  dataclasses.replace(data, plan=packing.best_fit).rows(LETTERS)
  assert not recwarn.list


class Answers:
  """Conversations of many lengths, of which the last two tokens are learned."""

  def examples(self, tokenizer):
    del tokenizer
    return [
      examples.Example(np.arange(n, dtype=np.int32), np.arange(n) >= n - 2)
      for n in (23, 6, 3, 31)
    ]


@pytest.mark.parametrize(
  "plan", [packing.concatenate, packing.best_fit, packing.one_per_row]
)
def test_rows_without_targets_are_left_out(plan):
  """Each would be a step of loss 0; all others stay, in their order."""
  found = Answers().examples(None)
  packed = packing.pack(
    [e.tokens for e in found], 5, plan, [e.loss_mask for e in found]
  )
  want = [packed[i] for i in range(len(packed))]
  some = [row for row in want if row["weights"].any()]
  assert 0 < len(some) < len(want)
  assert sum(row["weights"].sum() for row in some) == 2 * len(found)
  dropped = f"{len(want) - len(some)} of {len(want)} rows have no targets"
  with pytest.warns(RuntimeWarning, match=dropped):
    rows = pipeline.Pipeline(source=Answers(), length=5, plan=plan).rows(None)
  assert len(rows) == len(some)
  for i, row in enumerate(some):
    chex.assert_trees_all_equal(rows[i], row)


def test_plan_is_a_value():
  data = dataclasses.replace(DATA, plan=packing.best_fit, length=13)
  assert len(data.rows(LETTERS)) == 12


@pytest.mark.parametrize("field,value", [("length", 1), ("batch_size", 0)])
def test_sizes_that_hold_nothing(field, value):
  with pytest.raises(UserError, match=f"Pipeline.{field}: found {value}"):
    dataclasses.replace(DATA, **{field: value})


@pytest.mark.parametrize("change", [dict(begin=7), dict(end=7)])
def test_a_source_of_tokens_gets_no_others(change):
  """They were left out in silence; rows may repeat what examples begin with."""
  data = pipeline.Pipeline(source=Copy(vocab=4, length=2, count=1), length=6)
  assert dataclasses.replace(data, begin=None, end=None).rows(None)
  assert dataclasses.replace(data, begin=0, every_row=True).rows(None)
  with pytest.raises(UserError, match="found 7 for Copy, whose examples are"):
    dataclasses.replace(data, **change).rows(None)
