"""The result of generation: collects chunks of tokens into rows."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

NO_TOKEN = -1
"""Placeholder for tokens after the end of a row."""


@dataclasses.dataclass(frozen=True)
class Generated:
  """The result of `generate`.

  Attributes:
    tokens: new tokens of each prompt, without the stop token.
    reasons: finish reason of each prompt, `"stop"` or `"length"`.
  """

  tokens: list[list[int]]
  reasons: list[str]


def drop_empty_columns(tokens: np.ndarray) -> np.ndarray:
  """Drops the columns `[B, n]` in which no row has a token."""
  return tokens[:, np.any(tokens != NO_TOKEN, axis=0)]


def collect(
  parts: Iterable[np.ndarray], stop_tokens: Sequence[int]
) -> Generated:
  """Joins chunks of new tokens into rows.

  Args:
    parts: chunks `[B, n]`, each row padded with `NO_TOKEN`.
  """
  ends, out, reasons = set(stop_tokens), [], []
  for row in np.concatenate(list(parts), axis=1).tolist():
    row = [token for token in row if token != NO_TOKEN]
    stopped = row[-1] in ends
    out.append(row[:-1] if stopped else row)
    reasons.append("stop" if stopped else "length")
  return Generated(out, reasons)
