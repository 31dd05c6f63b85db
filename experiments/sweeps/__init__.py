"""Sweeps: units of work, who runs them, what they found."""

from experiments.sweeps.sweeps import (
  LONGEST,
  Sweep,
  Unit,
  Units,
  axis,
  bindings,
  chain,
  expand,
  name,
  over,
  product,
  zipped,
)

__all__ = [
  "LONGEST",
  "Sweep",
  "Unit",
  "Units",
  "axis",
  "bindings",
  "chain",
  "expand",
  "name",
  "over",
  "product",
  "zipped",
]
