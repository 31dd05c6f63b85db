"""How merged weights are rounded: the values of `--rounding`."""

from typing import Any, Literal

Rounding = Literal["nearest", "stochastic"]
"""Stochastic rounding keeps small updates on average."""


def make(name: Rounding, seed: int = 0) -> Any:
  """Returns the rounding of that name, see `research.lora.merge.changes`.

  Args:
    name: which.
    seed: of stochastic rounding.
  """
  from research.lora.merge import changes, merging

  kinds = dict(nearest=changes.cast, stochastic=merging.Stochastic(seed))
  return kinds[name]
