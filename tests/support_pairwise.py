"""Covering designs: few rows that try every pair of features."""

import itertools

import pytest


def thinned(factors, apart):
  """Every row of `pairwise(factors)`; most are slow where fewer rows do.

  Those few hold every value, and every pair but of the factors that are apart.
  """
  few = pairwise(factors, apart)
  return few + [
    pytest.param(row, marks=pytest.mark.slow)
    for row in pairwise(factors)
    if row not in few
  ]


def pairwise(factors, apart=()):
  """Rows that hold every pair of values of two factors, greedily.

  Args:
    factors: From names to values.
    apart: Pairs of names, whose values need not meet.
  """
  names = list(factors)
  pairs = {
    frozenset([(a, x), (b, y)])
    for a, b in itertools.combinations(names, 2)
    if (a, b) not in apart
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
