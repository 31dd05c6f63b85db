"""Rows of `quant_study`, by family: formats, then methods.

A family is a function that a run file names, `@quant_rows.rounding()`; its
arguments choose among it. What is calibrated reads other documents than those
that the table is measured on.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from experiments.studies.quant.quant_study import Row
from experiments.studies.quant.quant_training import Trained
from research.data.pipeline import Data
from research.lora.methods.lora import LoRA
from research.quant.algorithms.awq import AWQ
from research.quant.algorithms.calibrate import Calibration
from research.quant.algorithms.gptq import GPTQ
from research.quant.format import Format
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.ggml import GGML
from research.quant.formats.hqq import HQQ
from research.quant.formats.iq4 import IQ4NL, IQ4XS
from research.quant.formats.kquants import Q2K, Q3K, Q4K, Q5K, Q6K
from research.quant.formats.microscaling import Microscaling
from research.quant.formats.nvfp4 import NVFP4
from research.quant.methods import GPTQMethod, Method, RoundToNearest
from research.quant.quantize import Quantize
from research.quant.quantize_by_rules import Quantization, Rule


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


def blocks(sizes: Sequence[int] = (32, 64, 128, 256)) -> tuple[Row, ...]:
  """Returns integers and NF4 of 4 bits by how many inputs share a scale.

  NF4's magnitudes are float32, as bitsandbytes has them; integers' scales are
  float16, so bits differ by 16 a block.

  Args:
    sizes: of blocks.
  """
  return tuple(
    row(format, group=group)
    for size in sizes
    for group, format in (
      ("int4, asymmetric", Affine(block=size)),
      ("int4, symmetric", Affine(block=size, symmetric=True)),
      ("NF4", Codebook(block=size, nested=0)),
    )
  )


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


def hqq(
  bits: Sequence[int] = (4, 3), blocks: Sequence[int] = (64,)
) -> tuple[Row, ...]:
  """Returns even grids with float zeros that minimise errors of weights."""
  return tuple(
    row(HQQ(bits=b, block=block), group="integers")
    for b in bits
    for block in blocks
  )


def awq(
  calibration: Calibration,
  bits: Sequence[int] = (4, 3),
  blocks: Sequence[int] = (64,),
) -> tuple[Row, ...]:
  """Returns AWQ, whose scales are folded before matrices are rounded.

  Args:
    calibration: what is read.
    bits: of a code.
    blocks: inputs that share a scale.
  """
  out = []
  for b in bits:
    for block in blocks:
      format = Affine(bits=b, block=block)
      scale = AWQ(calibration=calibration, format=format)
      out.append(
        Row(
          name=f"AWQ {format.name}",
          transforms=(scale, Quantize(format=format)),
          group="calibrated",
        )
      )
  return tuple(out)


def gptq(
  calibration: Calibration,
  bits: Sequence[int] = (4, 3),
  blocks: Sequence[int] = (64,),
  order: str = "groups",
  drift: float = 0.5,
) -> tuple[Row, ...]:
  """Returns GPTQ on integers, and on NF4 with scales of scales.

  Args:
    calibration: what is read.
    bits: of a code.
    blocks: inputs that share a scale.
    order, drift: see `research.quant.algorithms.gptq`.
  """
  method = GPTQMethod(options=GPTQ(order=order, drift=drift))
  formats = [Affine(bits=b, block=block) for b in bits for block in blocks]
  return tuple(
    by_method(f, f"GPTQ {f.name}", calibration, method)
    for f in (*formats, Codebook(kind="nf4", block=64))
  )


def by_method(
  format: Format,
  name: str,
  calibration: Calibration,
  method: Method,
  group: str = "calibrated",
) -> Row:
  """Returns the row of a format whose codes a method chooses."""
  rule = Rule(match="^layers/", format=format, method=method)
  whole = Quantization(rules=(rule,), calibration=calibration, compare=False)
  return Row(name=name, transforms=(whole,), group=group)


def budget(
  calibration: Calibration,
  tokens: Sequence[int] = (32, 128, 512, 4096),
  format: Format = Affine(bits=3, block=64),
  draws: int = 1,
) -> tuple[Row, ...]:
  """Returns rounding to nearest, and GPTQ on ever more text.

  Twice: damped by 1% however few tokens there are, as by GPTQ's authors, and
  by more for few.

  Args:
    calibration: what is read, but for how much.
    tokens: how many are read; fewer than a window's are a shorter one.
    format: that is rounded to.
    draws: of each number of tokens, by `calibration.seed` and those after it.
  """
  options = GPTQ(drift=0.0)
  out = [row(format, group="uncalibrated")]
  for n, draw in itertools.product(tokens, range(draws)):
    length = min(n, calibration.length)
    some = dataclasses.replace(
      calibration,
      windows=n // length,
      length=length,
      seed=calibration.seed + draw,
    )
    for method, group in (
      (Undamped(options=options), "calibration"),
      (GPTQMethod(options=options), "calibration, damped"),
    ):
      name = f"GPTQ, {n} tokens" + group.removeprefix("calibration")
      name += f", draw {draw}" if draw else ""
      out.append(by_method(format, name, some, method, group))
  return tuple(out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Undamped(GPTQMethod):
  """GPTQ that takes its tokens for many, however few they are."""

  def parts(self, ws: Any, seen: Any, format: Format, starts: Any) -> Any:
    many = {name: 1e6 * seen[name] for name in ("xx", "n")}
    return super().parts(ws, dict(seen) | many, format, starts)


def gguf(
  kinds: Sequence[str] = ("Q4_0", "Q4_1", "Q5_0", "Q8_0"),
  supers: bool = True,
) -> tuple[Row, ...]:
  """Returns ggml's types.

  Args:
    kinds: of blocks of 32.
    supers: whether those of blocks of 256 are among them; both sides of every
      matrix must then be multiples of it.
  """
  formats = [*(GGML(kind=kind) for kind in kinds), IQ4NL()]
  if supers:
    formats += [Q2K(), Q3K(), IQ4XS(), Q4K(), Q5K(), Q6K()]
  return tuple(row(f, group="GGUF") for f in formats)


def imatrix(calibration: Calibration, supers: bool = True) -> tuple[Row, ...]:
  """Returns ggml's types with errors weighed by the inputs' mean squares.

  Args:
    calibration: what is read.
    supers: see `gguf`.
  """
  weighted = RoundToNearest(weighted=True)
  formats = (Q4K(), Q3K()) if supers else (GGML(kind="Q4_0"), IQ4NL())
  # Not of Q3_K: its codes cannot be chosen apart from its grids.
  chosen = formats[:1] if supers else formats
  return tuple(
    by_method(format, f"{said} {format.name}", calibration, method)
    for said, method, some in (
      ("imatrix", weighted, formats),
      ("GPTQ", GPTQMethod(), chosen),
    )
    for format in some
  )


def trained(
  data: Data,
  format: Format = Affine(bits=3, block=64, symmetric=True),
  steps: int = 100,
  seeds: int = 3,
) -> tuple[Row, ...]:
  """Returns a format alone, and after training through it.

  Args:
    data: what is read; its seed is that of the row.
    format: what is trained for.
    steps: updates.
    seeds: of data and adapters.
  """
  arms = {
    "masters": dict(rate=3e-4),
    "masters, on text": dict(rate=3e-4, distilled=False),
    "learned scales": dict(rate=3e-4, learned=True),
    "LoRA r=16": dict(rate=2e-3, adapter=LoRA(rank=16, alpha=16.0)),
  }
  return (
    row(format, group="rounded"),
    *(
      Row(
        name=f"{arm}, seed {seed}",
        transforms=(
          Trained(
            format=format,
            data=dataclasses.replace(data, seed=seed),
            steps=steps,
            **how,
          ),
        ),
        group=arm,
        errors=False,
        seed=seed,
      )
      for arm, how in arms.items()
      for seed in range(seeds)
    ),
  )
