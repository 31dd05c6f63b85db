"""What was generated: tokens of rows of different lengths, as they came."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

NO_TOKEN = -1
"""In place of tokens after a row's end."""


@dataclasses.dataclass(frozen=True)
class Generated:
  """What `generate` returns.

  Attributes:
    tokens: the new tokens of each prompt, without the stop token.
    reasons: for each, `"stop"` or `"length"`.
  """

  tokens: list[list[int]]
  reasons: list[str]


def drop_empty_columns(tokens: np.ndarray) -> np.ndarray:
  """Returns the columns in which some row still has a token."""
  return tokens[:, np.any(tokens != NO_TOKEN, axis=0)]


def collect(
  parts: Iterable[np.ndarray], stop_tokens: Sequence[int]
) -> Generated:
  """Returns all that was generated.

  Args:
    parts: new tokens `[B, n]` as they came, each row's first, then `NONE`.
    stop_tokens: that end a row.
  """
  ends, out, reasons = set(stop_tokens), [], []
  for row in np.concatenate(list(parts), axis=1).tolist():
    row = [token for token in row if token != NO_TOKEN]
    stopped = row[-1] in ends
    out.append(row[:-1] if stopped else row)
    reasons.append("stop" if stopped else "length")
  return Generated(out, reasons)
