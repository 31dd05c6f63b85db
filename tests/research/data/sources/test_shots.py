"""In-context recall: visible positions, evidence and baselines."""

import collections
import itertools

import numpy as np
import pytest

from research.data.sources.shots import Shots
from research.typing import UserError

SOURCE = Shots(keys=9, values=5, used=4, pairs=10, seed=3)


def pairs_of(row):
  return list(zip(row[0::2].tolist(), row[1::2].tolist(), strict=True))


def test_rows_have_a_mapping_of_their_own():
  rows = SOURCE.rows("train", 400)
  assert rows.shape == (400, 20) and SOURCE.mask_id == 14
  seen, values = set(), collections.Counter()
  for row in rows:
    told = dict(pairs_of(row))
    assert pairs_of(row) == [(k, told[k]) for k in row[0::2]]
    assert len(told) <= 4 and max(told) < 9 <= min(told.values())
    assert max(told.values()) < 14
    seen.add(tuple(sorted(told.items())))
    values.update(told.values())
  assert len(seen) > 390  # there are 78,750 of four keys
  share = np.array(list(values.values())) / values.total()
  # Any value is as likely, of every key: five standard errors.
  assert abs(share - 0.2).max() < 5 * (0.16 / values.total()) ** 0.5
  assert (SOURCE.rows("train", 400) == rows).all()
  assert (SOURCE.rows("heldout", 400) != rows).any()


def test_any_key_is_in_any_place():
  rows = SOURCE.rows("train", 2000)
  counts = np.stack([np.bincount(k, minlength=9) for k in rows[:, 0::2].T])
  error = (2000 * (1 / 9) * (8 / 9)) ** 0.5
  assert abs(counts - 2000 / 9).max() < 5 * error


@pytest.mark.parametrize(
  ("evidence", "shots"),
  [*itertools.product(("before", "none"), (1, 2, 9)),
   *itertools.product(("after",), (1, 3, 5))],
)  # fmt: skip
def test_a_question_has_its_evidence_there_and_nowhere_else(evidence, shots):
  asked = SOURCE.question(evidence, shots, "heldout", 300)
  known = np.flatnonzero(asked.visible)
  (position,) = np.flatnonzero(asked.scored)
  assert position % 2 == 1 and not asked.visible[position]
  pair = 4 if evidence == "after" else shots
  assert position == 2 * pair + 1
  last = 2 * (pair + shots) + 1 if evidence == "after" else position - 1
  assert set(known) == set(range(last + 1)) - {position}
  again = 0
  for row in asked.rows:
    key, value = pairs_of(row)[pair]
    told = {n for n in range(10) if {2 * n, 2 * n + 1} <= set(known)}
    same = {n for n in told if pairs_of(row)[n][0] == key}
    assert {pairs_of(row)[n][1] for n in same} <= {value}
    if evidence == "none":
      assert key not in {k for i, (k, _) in enumerate(pairs_of(row))
                         if i != pair}  # fmt: skip
    else:
      assert same and all((n > pair) == (evidence == "after") for n in same)
    again += len(same) > 1
  # More than one where there is room for it, by lot.
  assert (again > 0) == (evidence != "none" and shots > 1)


def test_what_makes_no_sense_is_refused():
  with pytest.raises(UserError, match="used: found 9, expected 2 to 8"):
    Shots(keys=9, used=9)
  with pytest.raises(UserError, match="found 6 shots after, expected 1 to 5"):
    SOURCE.question("after", 6, "heldout", 2)
  with pytest.raises(UserError, match="found 0 shots before"):
    SOURCE.question("before", 0, "heldout", 2)
