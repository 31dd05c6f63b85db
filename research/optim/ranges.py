"""Ranges of hyper-parameters, checked where an optimizer is made.

That is when a configuration is read, before a model is loaded; a rate below 0
would else climb the loss until it is no number. What is traced is not checked.
"""

import math
from collections.abc import Callable
from typing import Any

from research.typing import UserError


def non_negative(what: str, **values: Any) -> None:
  """Raises UserError unless all are finite, and at least 0.

  Args:
    what: they belong to, for the error.
    **values: by name; None and schedules pass.
  """
  _check(what, values, lambda x: x >= 0, "at least 0")


def positive(what: str, **values: Any) -> None:
  """Raises UserError unless all are finite, and above 0; see `non_negative`."""
  _check(what, values, lambda x: x > 0, "above 0")


def share(what: str, **values: Any) -> None:
  """Raises UserError unless all are from 0 to 1; see `non_negative`."""
  _check(what, values, lambda x: 0 <= x <= 1, "from 0 to 1")


def decay(what: str, **values: Any) -> None:
  """Raises UserError unless all are from 0 to below 1; see `non_negative`."""
  _check(what, values, lambda x: 0 <= x < 1, "from 0 to below 1")


def _check(
  what: str, values: dict[str, Any], good: Callable[[Any], bool], expected: str
) -> None:
  for name, value in values.items():
    if not isinstance(value, int | float):
      continue
    if not (math.isfinite(value) and good(value)):
      raise UserError(
        f"{what}.{name}: found {value}, expected a finite number {expected}."
      )
