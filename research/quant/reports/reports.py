"""Quantization reports: one row per matrix, as text table and as JSON."""

import dataclasses
import math
from typing import Any

import numpy as np

from research import tables
from research.quant.methods import RoundingErrors
from research.quant.qtensor import QTensor

HEAD = ("matrix", "format", "bits", "weights", "outputs", "nearest", "damp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """Report of one matrix, or of a stack of experts.

  For experts, errors are means, counts are sums.

  Attributes:
    address: address such as `layers/3/attention/q`.
    format, method: names of the format and the rounding method.
    matrices: number of matrices, the experts of a stack.
    bits: bits per weight, with scales and everything else.
    weight_error: root mean square error over that of the weights.
    output_error: the same for outputs on the calibration inputs, or None.
    nearest_error: `output_error` of rounding to nearest in the same format, or
      None.
    tokens: number of calibration inputs (smallest of the experts), or None.
    dead: number of inputs that were always 0, or None.
    damp, floor: damping of the Hessian's diagonal, see `hessian.Damping`
      (largest of the experts), or None.
    attempts: number of factorizations (largest of the experts), or None.
    failed: number of Hessians that could not be factored; their matrices are
      rounded to nearest.
  """

  address: str
  format: str
  method: str
  inputs: int
  outputs: int
  bits: float
  weight_error: float
  matrices: int = 1
  output_error: float | None = None
  nearest_error: float | None = None
  tokens: float | None = None
  dead: int | None = None
  damp: float | None = None
  floor: float | None = None
  attempts: int | None = None
  failed: int = 0

  @classmethod
  def from_errors(
    cls, address: str, q: QTensor, method: str, found: RoundingErrors
  ) -> "Row":
    def value(x, how=np.mean, kind=float):
      return None if x is None else kind(how(np.asarray(x)))

    more: dict[str, Any] = {}
    if found.damping is not None:
      d = found.damping
      more = dict(
        damp=value(d.damp, np.max),
        floor=value(d.floor, np.max),
        attempts=value(d.attempts, np.max, int),
        failed=value(d.failed, np.sum, int),
      )
    return cls(
      address=address,
      format=q.format.name,
      method=method,
      inputs=q.inputs,
      outputs=q.outputs,
      matrices=math.prod(q.lead),
      bits=q.bits_per_weight,
      weight_error=value(found.weight_error),
      output_error=value(found.output_error),
      nearest_error=value(found.nearest_error),
      tokens=value(found.tokens, np.min),
      dead=value(found.dead, np.sum, int),
      **more,
    )

  def warnings(self) -> list[str]:
    out = []
    if self.failed:
      out.append("no factor of its Hessian: rounded to nearest")
    elif self.floor:
      out.append(f"its Hessian's diagonal was raised, damped by {self.damp:g}")
    elif (self.attempts or 0) > 1:
      out.append(f"damped by {self.damp:g} after {self.attempts - 1} failures")
    if self.tokens is not None and self.tokens < self.inputs:
      text = f"{self.tokens:.0f} tokens for {self.inputs} inputs"
      out.append(text + (f": damped by {self.damp:g}" if self.damp else ""))
    if self.dead:
      out.append(f"{self.dead} of its inputs were always 0")
    return [f"{self.address}: {text}" for text in out]

  def cells(self) -> tuple[str, ...]:
    """Returns the row's cells, in the order of `HEAD`."""

    def cell(x):
      return "-" if x is None else f"{x:.4f}"

    return (
      self.address,
      self.format,
      f"{self.bits:.3f}",
      cell(self.weight_error),
      cell(self.output_error),
      cell(self.nearest_error),
      cell(self.damp),
    )


@dataclasses.dataclass(frozen=True)
class Report:
  """Report of a run of `quantize_by_rules.Quantization`.

  Attributes:
    calibration: record of the calibration windows, or None.
  """

  rows: tuple[Row, ...]
  calibration: dict[str, Any] | None = None

  def warnings(self) -> list[str]:
    return [text for row in self.rows for text in row.warnings()]

  def table(self) -> str:
    rows = [HEAD, *(row.cells() for row in self.rows)]
    return "\n".join(tables.aligned(rows, right=range(2, len(HEAD))))

  def summary(self) -> dict[str, Any]:
    """Returns averages and counts over all matrices, for JSON."""
    counts = [r.matrices * r.inputs * r.outputs for r in self.rows]
    size = sum(n * r.bits for n, r in zip(counts, self.rows, strict=True))
    return {
      "matrices": len(self.rows),
      "bits_per_weight": size / max(sum(counts), 1),
      "weight_error": _mean(r.weight_error for r in self.rows),
      "output_error": _mean(r.output_error for r in self.rows),
      "nearest_error": _mean(r.nearest_error for r in self.rows),
      "failed": sum(r.failed for r in self.rows),
      "warnings": len(self.warnings()),
    }

  def as_dict(self) -> dict[str, Any]:
    """Returns the full report as plain values, for JSON."""
    return {
      "calibration": self.calibration,
      "summary": self.summary(),
      "warnings": self.warnings(),
      "matrices": [dataclasses.asdict(row) for row in self.rows],
    }


def _mean(values: Any) -> float | None:
  found = [x for x in values if x is not None]
  return float(np.mean(found)) if found else None
