"""GPTQ's grids by when they are fitted, matrix by matrix on equal inputs.

Fresh grids see what rows before them left to be made up for; stale ones, as
most implementations have them, only what blocks of rows before did; static ones
nothing (`research.quant.algorithms.gptq`).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.core.stats import Mean, above, below, mean
from experiments.studies.protocol import Rows, Verdict
from experiments.studies.quant.quant_study import Row
from experiments.studies.quant.quant_verdicts import good
from research.quant.algorithms.calibrate import Calibration
from research.quant.algorithms.gptq import GPTQ
from research.quant.format import Format
from research.quant.formats.affine import Affine
from research.quant.methods import GPTQMethod, RoundToNearest
from research.quant.quantize_by_rules import Quantization, Rule


def rows(
  calibration: Calibration,
  format: Format = Affine(bits=3, block=32),
  match: str = r"^layers/\d*[05]/",
) -> tuple[Row, ...]:
  """Returns rounding to nearest, and GPTQ by when a group's grid is fitted.

  Rows go in their natural order, and every matrix sees the unrounded model's
  inputs, so that errors of matrices differ by the grids alone.

  Args:
    calibration: what is read.
    format: of groups of less than `gptq.MAX_BLOCK` rows; else stale grids are
      fresh.
    match: finds the matrices that are rounded.
  """
  ways = {"nearest": RoundToNearest()} | {
    when: GPTQMethod(options=GPTQ(order="natural", grids=when))
    for when in ("fresh", "stale", "static")
  }
  return tuple(
    Row(
      name=f"{format.name} {way}",
      transforms=(
        Quantization(
          rules=(Rule(match=match, format=format, method=method),),
          calibration=None if way == "nearest" else calibration,
          sequential="none",
          compare=False,
        ),
      ),
      group=way,
    )
    for way, method in ways.items()
  )


def fitted(found: Rows) -> list[Verdict]:
  """Returns what GPTQ, and when its grids are fitted, do to layers' outputs.

  An error is the squared one of a matrix' outputs, over all tokens; a ratio is
  the geometric mean over a layer's matrices, its interval Student's, over
  layers.

  Args:
    found: `rows`, measured.
  """
  by = {row["group"]: row for row in good(found).values()}
  out = []
  if {"nearest", "fresh"} <= by.keys():
    ratio = squares(by["fresh"], by["nearest"])
    out.append(
      Verdict(
        "GPTQ halves the squared error of layers' outputs",
        f"{ratio} of nearest's; {_wins(by['fresh'], by['nearest'])}",
        below(ratio, 0.5),
      )
    )
  for when in ("stale", "static"):
    if {when, "fresh"} <= by.keys():
      ratio = squares(by[when], by["fresh"])
      out.append(
        Verdict(
          f"{when} grids cost a tenth of it or more",
          f"{ratio} of fresh grids'; {_wins(by['fresh'], by[when])}",
          above(ratio, 1.1),
        )
      )
  return out


def squares(a: Mapping[str, Any], b: Mapping[str, Any]) -> Mean:
  """Returns the ratio of rows' squared errors of outputs, over layers."""
  logs: dict[str, list[float]] = {}
  for address, error in a["matrices"].items():
    ratio = error["output_all"] / b["matrices"][address]["output_all"]
    layer = address.rsplit("/", 2)[0]
    logs.setdefault(layer, []).append(2 * math.log(ratio))
  return mean([math.exp(np.mean(x)) for x in logs.values()])


def _wins(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
  """Says of how many matrices the first row's errors are smaller."""
  pairs = [
    (x["output_all"], b["matrices"][address]["output_all"])
    for address, x in a["matrices"].items()
  ]
  less = sum(x < y for x, y in pairs)
  return f"{a['group']} is better in {less} of {len(pairs)} matrices"
