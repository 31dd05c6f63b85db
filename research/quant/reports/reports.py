"""What became of each matrix of a model, for people and for files."""

import dataclasses
from typing import Any

import numpy as np

from research.quant.methods import Measures
from research.quant.qtensor import QTensor

HEAD = ("matrix", "format", "bits", "weights", "outputs", "nearest", "damp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One matrix, or one stack of experts: then means, and sums of counts.

  Attributes:
    address: such as `layers/3/attention/q`.
    format, method: names.
    inputs, outputs: of the matrix.
    bits: of a weight, everything counted.
    weight_error: of the weights, over their root mean square.
    output_error: of the outputs for the inputs seen, the same way, or None.
    nearest_error: that of rounding to nearest in the same format, or None.
    tokens: fewest inputs that were seen, or None.
    dead: inputs that were always 0, or None.
    damp, floor: what was added to the Hessian's diagonal, shares of its mean
      and of its largest; the most, or None without one.
    attempts: most factorizations until one succeeded, or None.
    failed: Hessians without one, whose matrices are rounded to nearest.
  """

  address: str
  format: str
  method: str
  inputs: int
  outputs: int
  bits: float
  weight_error: float
  output_error: float | None = None
  nearest_error: float | None = None
  tokens: float | None = None
  dead: int | None = None
  damp: float | None = None
  floor: float | None = None
  attempts: int | None = None
  failed: int = 0

  @classmethod
  def of(cls, address: str, q: QTensor, method: str, found: Measures) -> "Row":
    """Returns the row of a packed matrix."""

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
      bits=q.bits_per_weight,
      weight_error=value(found.weight_error),
      output_error=value(found.output_error),
      nearest_error=value(found.nearest_error),
      tokens=value(found.tokens, np.min),
      dead=value(found.dead, np.sum, int),
      **more,
    )

  def warnings(self) -> list[str]:
    """Returns what should be said aloud."""
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
    """Returns its cells in the table."""

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
  """A run of `quantize_by_rules.Quantization`.

  Attributes:
    rows: one a matrix.
    calibration: what tells the windows from others, or None.
  """

  rows: tuple[Row, ...]
  calibration: dict[str, Any] | None = None

  def warnings(self) -> list[str]:
    """Returns what should be said aloud."""
    return [text for row in self.rows for text in row.warnings()]

  def table(self) -> str:
    """Returns the rows as text."""
    rows = [HEAD, *(row.cells() for row in self.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
      "  ".join(
        cell.rjust(w) if k > 1 else cell.ljust(w)
        for k, (cell, w) in enumerate(zip(row, widths, strict=True))
      ).rstrip()
      for row in rows
    )

  def summary(self) -> dict[str, Any]:
    """Returns the whole as one JSON object's fields."""
    size = sum(r.inputs * r.outputs * r.bits for r in self.rows)
    count = sum(r.inputs * r.outputs for r in self.rows)
    return {
      "matrices": len(self.rows),
      "bits_per_weight": size / max(count, 1),
      "weight_error": _mean(r.weight_error for r in self.rows),
      "output_error": _mean(r.output_error for r in self.rows),
      "nearest_error": _mean(r.nearest_error for r in self.rows),
      "failed": sum(r.failed for r in self.rows),
      "warnings": len(self.warnings()),
    }

  def plain(self) -> dict[str, Any]:
    """Returns everything as plain values, for a file."""
    return {
      "calibration": self.calibration,
      "summary": self.summary(),
      "warnings": self.warnings(),
      "matrices": [dataclasses.asdict(row) for row in self.rows],
    }


def _mean(values: Any) -> float | None:
  found = [x for x in values if x is not None]
  return float(np.mean(found)) if found else None
