"""What quantization lost, in tables."""

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
