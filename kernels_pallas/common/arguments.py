"""Checks of arguments that all kernels share."""

import math
from typing import Any

import jax


def has_values(x: Any) -> bool:
  """Whether this process knows an array's values, and can check them.

  It does not while they are traced, nor where other hosts have some.
  """
  if isinstance(x, jax.core.Tracer):
    return False
  return getattr(x, "is_fully_addressable", True)


def check_softcap(softcap: float | None) -> None:
  """Raises ValueError for a soft cap that is not positive and finite."""
  if softcap is not None and not 0 < softcap < math.inf:
    raise ValueError(
      f"softcap: found {softcap}, expected a positive finite number"
    )
