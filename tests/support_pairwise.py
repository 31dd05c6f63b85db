"""Covering designs: few rows that try every pair of features."""

import itertools

import pytest


def pairwise(factors):
  """Rows that hold every pair of values of two factors, greedily."""
  names = list(factors)
  pairs = {
    frozenset([(a, x), (b, y)])
    for a, b in itertools.combinations(names, 2)
    for x in factors[a]
    for y in factors[b]
  }
  rows = []

  def gain(row):
    return sum(
      frozenset(p) in pairs
      for p in itertools.combinations(zip(names, row, strict=True), 2)
    )

  every = list(itertools.product(*factors.values()))
  while pairs:
    best = max(every, key=gain)
    rows.append(dict(zip(names, best, strict=True)))
    pairs -= {frozenset(p) for p in itertools.combinations(rows[-1].items(), 2)}
  return rows


def cases(factors):
  """Rows of `pairwise` as parameters; all of them run with --slow.

  Without, those in which some value stands for the first time: every value is
  tried, and not every pair.
  """
  seen, out = set(), []
  for row in pairwise(factors):
    new = row.items() - seen
    seen |= row.items()
    name = "-".join(map(str, row.values()))
    out.append(
      pytest.param(row, id=name, marks=() if new else pytest.mark.slow)
    )
  return out
