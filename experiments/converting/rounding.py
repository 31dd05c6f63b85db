"""How merged weights are rounded: the values of `--rounding`."""

from typing import Any, Literal

Rounding = Literal["nearest", "stochastic"]
"""Stochastic rounding keeps small updates on average."""


def make(name: Rounding, seed: int = 0) -> Any:
  """Returns the rounding of that name, see `research.lora.merge.changes`."""
  from research.lora.merge import changes, merge

  kinds = dict(nearest=changes.cast, stochastic=merge.StochasticRounding(seed))
  return kinds[name]
