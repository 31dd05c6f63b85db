"""Mixture of experts: routing and grouped matmuls."""

from research.nn.moe.moe import (
  Experts,
  Moe,
)

__all__ = [
  "Experts",
  "Moe",
]
