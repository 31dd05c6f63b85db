"""Covering designs: few rows that contain every pair of features."""

import itertools

import pytest


def pairwise(factors):
  """Rows that contain every pair of values of two factors, greedily."""
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

  Without it, only the rows with a value that no earlier row has: every value is
  tested, but not every pair.
  """
  rows = pairwise(factors)
  names = ["-".join(map(str, row.values())) for row in rows]
  return first_of_each(rows, names, [row.items() for row in rows])


def first_of_each(rows, names, values):
  """Returns rows as parameters; those without a new value run with --slow."""
  seen, out = set(), []
  for row, name, own in zip(rows, names, values, strict=True):
    marks = () if own - seen else pytest.mark.slow
    out.append(pytest.param(row, id=name, marks=marks))
    seen |= own
  return out
