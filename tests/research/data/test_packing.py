"""Packing: every token is predicted once, and documents are recovered."""

import grain
import grain.experimental
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data import packing
from research.text.special_tokens import SpecialTokens
from research.typing import UserError

PLANS = [packing.concatenate, packing.best_fit, packing.one_per_row]


def _unpack(rows):
  """Rebuilds (token, next token) pairs of each piece from the rows alone."""
  pieces = []
  for row in (rows[i] for i in range(len(rows))):
    for segment in range(row["segments"].max() + 1):
      here = row["segments"] == segment
      pieces.append({k: v[here] for k, v in row.items()})
  return pieces


@pytest.mark.parametrize("plan", PLANS)
@given(
  lengths=st.lists(st.integers(2, 40), min_size=1, max_size=12),
  row=st.integers(2, 17),
)
@settings(max_examples=60, deadline=None)
def test_every_token_but_the_first_is_a_target_once(plan, lengths, row):
  starts = np.cumsum([0, *lengths])
  documents = [
    np.arange(s, s + n, dtype=np.int32)
    for s, n in zip(starts[:-1], lengths, strict=True)
  ]
  rows = packing.pack(documents, row, plan)
  pieces = _unpack(rows)
  tokens = np.sort(np.concatenate([p["tokens"] for p in pieces]))
  np.testing.assert_array_equal(tokens, np.arange(starts[-1]))
  learned = [p["targets"][p["weights"] > 0] for p in pieces]
  firsts = set(starts[:-1])
  want = [t for t in range(starts[-1]) if t not in firsts]
  np.testing.assert_array_equal(np.sort(np.concatenate(learned)), want)
  for p in pieces:
    assert 1 <= len(p["tokens"]) <= row
    np.testing.assert_array_equal(p["positions"], np.arange(len(p["tokens"])))
    on = p["weights"] > 0
    np.testing.assert_array_equal(p["targets"][on], p["tokens"][on] + 1)


@pytest.mark.parametrize("plan", PLANS)
@given(
  lengths=st.lists(st.integers(3, 40), min_size=1, max_size=12),
  row=st.integers(4, 17),
  own=st.lists(st.booleans(), min_size=12, max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_pieces_of_what_begins_with_bos_do_too(plan, lengths, row, own):
  """The same targets, once each, after two repeated tokens without weight."""
  begin = (900, 901)
  starts = np.cumsum([0, *lengths])
  documents = [
    np.array([*begin, *range(s + 2, e)] if first else range(s, e), np.int32)
    for s, e, first in zip(starts[:-1], starts[1:], own, strict=False)
  ]
  rows = packing.pack(documents, row, plan, begin=begin)
  pieces = _unpack(rows)
  targets = [p["targets"][p["weights"] > 0] for p in pieces]
  want = [d[1:] for d in documents]
  np.testing.assert_array_equal(
    np.sort(np.concatenate(targets)), np.sort(np.concatenate(want))
  )
  seen = [t for p in pieces for t in p["tokens"] if t < 900]
  assert sorted(seen) == sorted(i for d in documents for i in d if i < 900)
  of = {i: first for d, first in zip(documents, own, strict=False) for i in d}
  for p in pieces:
    assert len(p["tokens"]) <= row
    np.testing.assert_array_equal(p["positions"], np.arange(len(p["tokens"])))
    last = p["tokens"][-1]
    cut = last in begin  # by the end of a row
    assert cut or (tuple(p["tokens"][:2]) == begin) == of[last]
    assert list(p["tokens"]).count(901) <= 1
    for token, target in zip(p["tokens"], p["targets"], strict=True):
      assert target in (0, 901, token + 1) or token == 901


def test_a_row_has_room_behind_what_it_begins_with():
  with pytest.raises(UserError, match="length: found 2, expected at least 3"):
    packing.pack([np.arange(3)], 2, begin=(0,))


@pytest.mark.parametrize("plan", PLANS)
@given(
  lengths=st.lists(st.integers(2, 40), min_size=1, max_size=12),
  row=st.integers(2, 17),
  seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_weights_are_on_the_tokens_to_learn(plan, lengths, row, seed):
  """For any splits of documents and any loss mask."""
  starts = np.cumsum([0, *lengths])
  flags = np.random.default_rng(seed).random(starts[-1]) < 0.5
  documents, learned = (
    [x[s:e] for s, e in zip(starts[:-1], starts[1:], strict=True)]
    for x in (np.arange(starts[-1]), flags)
  )
  rows = packing.pack(documents, row, plan, learned)
  got = [
    r["targets"][r["weights"] > 0] for r in (rows[i] for i in range(len(rows)))
  ]
  flags[starts[:-1]] = False  # a document's first token has no one before it
  np.testing.assert_array_equal(
    np.sort(np.concatenate(got)), np.flatnonzero(flags)
  )


def test_concatenate_pads_the_last_row_only():
  rows = packing.pack([np.arange(7), np.arange(9), np.arange(5)], 8)
  assert len(rows) == 3
  padding = [(rows[i]["segments"] < 0).sum() for i in range(3)]
  assert padding == [0, 0, 3]
  last = rows[2]
  assert (last["positions"][5:] == -1).all()
  assert (last["weights"][4:] == 0).all()


def test_best_fit_cuts_no_document_that_fits():
  lengths = [5, 3, 8, 2, 6, 11]
  plan = packing.best_fit(lengths, 8)
  whole = [p for row in plan for p in row if lengths[p.document] <= 8]
  assert all(p.size == lengths[p.document] for p in whole)
  assert all(sum(p.size for p in row) <= 8 for row in plan)
  assert len(plan) == 5  # 8 | 8 | 6+2 | 5+3 | 3


def test_grain_packs_a_stream_and_into_more_rows():
  """Why packing is by hand; once it fails, less of it has to be."""
  sizes = np.random.default_rng(0).integers(2, 129, 400).tolist()

  def packed(sizes, bins):
    documents = [{"x": np.zeros(n, np.int32)} for n in sizes]
    source = grain.MapDataset.source(documents).to_iter_dataset()
    return grain.experimental.BestFitPackIterDataset(
      source, length_struct={"x": 128}, num_packing_bins=bins
    )

  found = [len(list(packed(sizes, bins))) for bins in (400, 16)]
  assert len(packing.best_fit(sizes, 128)) == 225 < found[0] < found[1]
  assert not hasattr(packed(sizes, 16), "__getitem__")
  with pytest.raises(ValueError, match="must be truncated"):
    list(packed([200], 2))


def test_tokenize_appends_the_end_and_drops_what_teaches_nothing():
  encode, end = (lambda s: [ord(c) for c in s]), SpecialTokens(end=(0,))
  tokens = packing.tokenize(["ab", "", "c"], encode, end)
  assert [t.tolist() for t in tokens] == [[97, 98, 0], [99, 0]]
  with pytest.raises(UserError, match="none with two tokens"):
    packing.tokenize(["a", ""], encode)


def test_a_row_of_one_place_is_an_error():
  with pytest.raises(UserError, match="length: found 1"):
    packing.pack([np.arange(3)], 1)
