"""Batches without a pipeline: those that packing one document a row makes."""

import jax
import numpy as np
import pytest

from research.data import batch_of, packing
from research.typing import UserError

DOCUMENTS = [[5, 1, 2, 9], [3], [7, 4]]


def _packed(loss_mask=None):
  documents = [np.array(d, np.int32) for d in DOCUMENTS]
  rows = packing.pack(documents, 4, packing.one_per_row, loss_mask)
  return {k: np.stack([row[k] for row in rows]) for k in rows[0]}


def _assert_equal(found, expected):
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    assert found[name].dtype == x.dtype, name
    np.testing.assert_array_equal(found[name], x, err_msg=name)


def test_lists_of_ids_are_packed_one_a_row():
  _assert_equal(batch_of(DOCUMENTS), _packed())
  mask = [np.array([False] * (len(d) - 1) + [True]) for d in DOCUMENTS]
  padded = np.zeros((3, 4), bool)
  for row, own in zip(padded, mask, strict=True):
    row[: len(own)] = own
  _assert_equal(batch_of(DOCUMENTS, padded), _packed(mask))


def test_an_array_is_its_rows_traced_or_not():
  rows = np.arange(12).reshape(3, 4)
  expected = batch_of(rows.tolist())
  _assert_equal(batch_of(rows), expected)
  _assert_equal(jax.jit(batch_of)(rows), expected)


def test_a_token_before_each_row_makes_every_token_a_target():
  found = batch_of(DOCUMENTS, begin=np.array([8, 6, 6]))
  assert found["tokens"].tolist() == [[8, 5, 1, 2], [6, 3, 0, 0], [6, 7, 4, 0]]
  assert found["targets"].tolist() == [[5, 1, 2, 9], [3, 0, 0, 0], [7, 4, 0, 0]]
  assert found["weights"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]
  same = batch_of(DOCUMENTS, begin=6)
  assert same["tokens"][1:].tolist() == found["tokens"][1:].tolist()


@pytest.mark.parametrize("tokens", [[], [[]], np.zeros((2, 0), np.int32)])
def test_nothing_to_learn_from(tokens):
  with pytest.raises(UserError, match="expected at least one row"):
    batch_of(tokens)
