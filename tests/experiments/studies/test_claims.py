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


KL = {
  "nearest": [{"kl": 0.30, "se": 0.03, "top": 0.6}],
  "gptq": [{"kl": 0.20, "se": 0.04, "top": 0.9}],
}


@pytest.mark.parametrize(
  "fields, state",
  [
    # Two errors of both are 0.1: as much as they are apart.
    (dict(second="nearest", holds="below", error="se"), "undecided"),
    (dict(second="nearest", holds="below"), "undecided"),  # one seed
    (dict(second="nearest", holds="below", error=0.0), "holds"),
    (dict(second="nearest", holds="within", margin=0.25, error="se"), "holds"),
    (dict(second=0.10, holds="below", error="se"), "does not hold"),
    (dict(second=0.125, holds="below", error="se"), "undecided"),
    (dict(second=0.6, metric="top", error=0.0), "holds"),
  ],
)
def test_an_error_over_texts_decides_in_place_of_seeds(fields, state):
  fields = dict(metric="kl", first="gptq") | fields
  assert Claim(claim="c", **fields).verdict(KL).state == state


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
