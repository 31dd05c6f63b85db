"""Mixtures of experts: routing and grouped products."""

from research.nn.moe.moe import (
  Experts,
  Moe,
)

__all__ = [
  "Experts",
  "Moe",
]
