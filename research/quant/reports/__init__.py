"""Reports of quantization errors: per matrix, per layer and per token."""

from research.quant.reports.reports import (
  HEAD,
  Report,
  Row,
)

__all__ = [
  "HEAD",
  "Report",
  "Row",
]
