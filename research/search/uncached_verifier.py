"""Verifiers without a cache: they read a problem anew with each of its steps.

`cached_verifier` has those that keep what they have read.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from research.search.ledger import Ledger
from research.typing import UserError


class UncachedVerifier:
  """What such verifiers share; their state is a list, with a value a row."""

  KIND: ClassVar[str]
  """In words, for errors."""

  def prompt_cost(self, tokens: int) -> Ledger:
    """Returns nothing: a problem is read with each of its steps."""
    del tokens
    return Ledger()

  def step_cost(self, start: int, tokens: int) -> Ledger:
    """Raises UserError: a step's cost is known once it has been judged."""
    raise UserError(
      f"step_cost: found {self.KIND}, of {tokens} tokens after {start},"
      " whose cost is known only afterwards; expected a call of `spent`"
    )

  def select(self, state: Sequence[Any], rows: Sequence[int]) -> list[Any]:
    return [state[row] for row in rows]

  def store(
    self, state: Sequence[Any], new: Sequence[Any], rows: Sequence[int]
  ) -> list[Any]:
    stored = list(state)
    for row, value in zip(rows, new, strict=True):
      if row < len(stored):
        stored[row] = value
    return stored
