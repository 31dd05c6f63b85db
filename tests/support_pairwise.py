"""Covering designs: few rows that try every pair of features."""

import itertools


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
