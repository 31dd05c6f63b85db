"""What denoisers are compared with: one pass over whole rows in numpy.

Positions and who sees whom are counted token by token, from the words of the
specification, not by the code under test.
"""

import numpy as np

from tests import support_numpy


def places(valid):
  """Returns positions: 0, 1, .. over a row's own tokens, -1 for padding."""
  out = np.full(valid.shape, -1)
  for row, own in zip(out, valid, strict=True):
    row[own] = range(own.sum())
  return out


def sees(valid, block):
  """Returns `[B, T, T]`: which token (second) each token (first) sees.

  All of its row; of a model with blocks, which are counted from the row's
  first index, those up to the end of its own.
  """
  rows, length = valid.shape
  out = np.zeros((rows, length, length), bool)
  for b in range(rows):
    for i in range(length):
      last = length if block is None else (i // block + 1) * block
      for j in range(min(last, length)):
        out[b, i, j] = valid[b, i] and valid[b, j]
  return out


def logits(model, params, tokens, valid, block, time=None):
  """Returns logits of every place, `[B, T, V]`, float64."""
  valid = np.asarray(valid)
  return support_numpy.logits(
    model, params, tokens, places(valid), sees(valid, block), time
  )
