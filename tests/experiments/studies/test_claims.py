"""Claims about a number of two steps: decided by intervals over seeds."""

import pytest

from experiments.studies import claims
from experiments.studies.claims import Claim
from research.typing import UserError

ROWS = {
  "full": [{"loss": 2.0, "begun": 4.0}, {"loss": 2.1, "begun": 4.1}],
  "lora": [{"loss": 2.1, "begun": 4.0}, {"loss": 2.21, "begun": 4.1}],
  "once": [{"loss": 3.0}],
}


@pytest.mark.parametrize(
  "fields, state",
  [
    (dict(first="lora", second="full", holds="below"), "does not hold"),
    (
      dict(first="lora", second="full", holds="within", margin=0.1),
      "undecided",
    ),
    (dict(first="lora", second="once", holds="below", margin=0.1), "holds"),
    (dict(first="once", second="lora", holds="below"), "does not hold"),
    (dict(first="lora", second="full", holds="within", margin=0.2), "holds"),
    (dict(first="lora", second=1.0, margin=0.1), "holds"),
    (
      dict(
        first="lora", second="full", holds="recovers", margin=0.9, start="begun"
      ),
      "holds",
    ),
    (
      dict(
        first="lora", second="full", holds="recovers", margin=1, start="begun"
      ),
      "does not hold",
    ),
  ],
)
def test_the_interval_decides(fields, state):
  found = Claim(claim="c", metric="loss", **fields).verdict(ROWS)
  assert found.state == state
  assert " against " in found.found


def test_a_metric_is_found_where_names_have_dots_and_slashes():
  row = {"a/b": 1, "c": {"d.e": {"f": 2}}, "g": {"h": True}}
  assert claims.value(row, "a/b") == 1
  assert claims.value(row, ("a/b", "c.d.e.f")) == 1.5
  assert not claims.has(row, ("a/b", "c.d"))
  with pytest.raises(UserError, match="'g.h': found no number .*c.d.e.f"):
    claims.value(row, "g.h")


def test_seeds_have_to_match():
  rows = {**ROWS, "once": [{"loss": 1.0}] * 3}
  with pytest.raises(UserError, match="found 2 and 3 seeds"):
    Claim(claim="c", metric="loss", first="lora", second="once").verdict(rows)
