"""Rows of `experiments.quant_table`, by family: formats, then methods.

A family is a function that a run file names, `@quant_rows.rounding()`; its
arguments choose among it. What is calibrated reads other documents than those
that the table is measured on.
"""

from collections.abc import Sequence

from experiments.quant_study import Row
from research.quant.format import Format
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.microscaling import Microscaling
from research.quant.formats.nvfp4 import NVFP4
from research.quant.quantize import Quantize


def row(
  format: Format, name: str | None = None, group: str = "rounding"
) -> Row:
  """Returns the row of a format that all layers' matrices are rounded to."""
  quantize = Quantize(format=format)
  return Row(name=name or format.name, transforms=(quantize,), group=group)


def rounding(
  bits: Sequence[int] = (4, 3),
  blocks: Sequence[int] = (32, 64, 0),
  symmetric: Sequence[bool] = (False, True),
) -> tuple[Row, ...]:
  """Returns integers, rounded to nearest.

  Args:
    bits: of a code.
    blocks: inputs that share a scale; 0 for all of them.
    symmetric: whether the zero is the middle code.
  """
  return tuple(
    row(Affine(bits=b, block=block, symmetric=middle), group="integers")
    for b in bits
    for block in blocks
    for middle in symmetric
  )


def codebooks(kinds: Sequence[str] = ("nf4", "fp4")) -> tuple[Row, ...]:
  """Returns bitsandbytes' formats; NF4 with scales of scales, too."""
  plain = [
    row(Codebook(kind=kind, block=64, nested=0), group="codebooks")
    for kind in kinds
  ]
  return (*plain, row(Codebook(kind="nf4", block=64), group="codebooks"))


def floats() -> tuple[Row, ...]:
  """Returns 4-bit floats of the OCP and of NVIDIA."""
  return (
    *(
      row(Microscaling(rule=rule), f"mxfp4, {rule}", "floats")
      for rule in ("floor", "even")
    ),
    row(NVFP4(), group="floats"),
    row(NVFP4(search=6), "nvfp4, searched", "floats"),
  )
