"""Covering designs: few rows that contain every pair of features."""

import itertools

import numpy as np
import pytest


def pairwise(factors, allowed=lambda row: True):
  """Rows that contain every pair of values of two factors, greedily.

  Args:
    factors: name -> values.
    allowed: whether a row (name -> value) may be used; what only other rows
      contain is left out.
  """
  rows = [
    dict(zip(factors, values, strict=True))
    for values in itertools.product(*factors.values())
  ]
  rows = [row for row in rows if allowed(row)]
  numbers = {}
  pairs = np.array(
    [
      [
        numbers.setdefault(pair, len(numbers))
        for pair in itertools.combinations(row.items(), 2)
      ]
      for row in rows
    ]
  )
  left, chosen = np.ones(len(numbers), bool), []
  while left.any():
    chosen.append(int(left[pairs].sum(1).argmax()))
    left[pairs[chosen[-1]]] = False
  return [rows[i] for i in chosen]


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
