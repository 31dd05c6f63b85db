"""Rows of `quant_study` whose activations are in few bits, too.

What repairs them stands beside what they are without: SmoothQuant, LLM.int8,
QuaRot. Weights are in 8 bits where activations are the question.
"""

from experiments.studies.protocol import Rows, Verdict
from experiments.studies.quant.quant_study import Row
from research.quant import llm_int8
from research.quant.activations import Inputs, Round
from research.quant.algorithms.calibrate import Calibration
from research.quant.algorithms.gptq import GPTQ
from research.quant.algorithms.rotate import Rotate
from research.quant.algorithms.smoothquant import SmoothQuant
from research.quant.algorithms.spinquant import SpinQuant
from research.quant.formats.affine import Affine
from research.quant.methods import GPTQMethod
from research.quant.quantize import Quantize
from research.quant.quantize_by_rules import Quantization, Rule

TENSOR, EIGHT = Round(bits=8, per="tensor"), Round(bits=8)
FOUR = Round(bits=4, clip=0.9)
BEHIND = r"/(attention/(q|k|v)|mlp/(\w+/)?(gate|up))$"
OTHERS = r"/(attention/o|mlp/(\w+/)?down)$"


def rows(
  calibration: Calibration, alpha: float = 0.5, block: int = 64
) -> tuple[Row, ...]:
  """Returns rows named by the bits of weights and activations: W8A8.

  Args:
    calibration: what SmoothQuant and GPTQ read.
    alpha: SmoothQuant's.
    block: weights of a group, at 4 bits.
  """
  smooth = SmoothQuant(calibration=calibration, alpha=alpha)
  weights8 = Quantize(format=llm_int8.INT8)
  format = Affine(bits=4, block=block, symmetric=True)
  weights4 = Quantize(format=format)
  gptq = Quantization(
    rules=(
      Rule(
        match="^layers/",
        format=format,
        method=GPTQMethod(options=GPTQ(drift=0.0)),
      ),
    ),
    calibration=calibration,
  )
  outliers = llm_int8.Outliers()
  behind = (
    Inputs(op=TENSOR, targets=BEHIND),
    Inputs(op=EIGHT, targets=OTHERS),
  )
  made = {
    "W8A8 tensor": (weights8, Inputs(op=TENSOR)),
    "W8A8 tensor, SmoothQuant": (smooth, weights8, Inputs(op=TENSOR)),
    "W8A8 tensor behind norms": (weights8, *behind),
    "W8A8 tensor behind norms, SmoothQuant": (smooth, weights8, *behind),
    "W8A8 token": (weights8, Inputs(op=EIGHT)),
    "W8A8 LLM.int8": (weights8, Inputs(op=outliers)),
    "W8A4": (weights8, Inputs(op=FOUR)),
    "W8A4 SmoothQuant": (smooth, weights8, Inputs(op=FOUR)),
    "W8A4 rotated": (Rotate(), weights8, Inputs(op=FOUR)),
    "W4A4": (weights4, Inputs(op=FOUR)),
    "W4A4 rotated": (Rotate(), weights4, Inputs(op=FOUR)),
    "W4A4 rotated, GPTQ": (Rotate(), gptq, Inputs(op=FOUR)),
  }
  return tuple(
    Row(name=name, transforms=transforms, group=name[:4], errors=False)
    for name, transforms in made.items()
  )


def learned(
  calibration: Calibration, steps: int = 100, bits: int = 4, seeds: int = 3
) -> tuple[Row, ...]:
  """Returns rotations by random matrices, and learned from these.

  Args:
    calibration: what SpinQuant reads.
    steps: of the learning.
    bits: of activations; weights have 8.
    seeds: of the random matrices.
  """
  op = Round(bits=bits)
  spin = SpinQuant(calibration=calibration, op=op, steps=steps)
  ways = {"as it is": None, "random": Rotate(), "learned": spin}
  return tuple(
    Row(
      name=f"W8A{bits} {way}" + (f", seed {seed}" if turn else ""),
      transforms=(
        *([turn] if turn else []),
        Quantize(format=llm_int8.INT8),
        Inputs(op=op),
      ),
      group=way,
      errors=False,
      seed=seed,
    )
    for way, turn in ways.items()
    for seed in range(seeds if turn else 1)
  )


def better_learned(rows: Rows) -> list[Verdict]:
  """Returns whether learned rotations lose less, for each seed.

  Args:
    rows: measured, by name.
  """
  pairs = [
    (row["kl"], rows[name.replace("learned", "random")]["kl"])
    for name, row in rows.items()
    if " learned" in name and name.replace("learned", "random") in rows
  ]
  if not pairs:
    return []
  found = ", ".join(f"KL {b:.4g} to {a:.4g}" for a, b in pairs)
  claim = "a learned rotation loses less than the random one it starts from"
  return [Verdict(claim, found, all(a < b for a, b in pairs))]


CLAIMS = (
  (
    "W8A8 tensor behind norms, SmoothQuant",
    "W8A8 tensor behind norms",
    "SmoothQuant repairs what norms feed",
  ),
  ("W8A8 tensor, SmoothQuant", "W8A8 tensor", "and so all of the model"),
  ("W8A8 token", "W8A8 tensor", "a scale for each token repairs it"),
  ("W8A4 rotated", "W8A4", "rotations repair 4-bit activations"),
  ("W8A4 rotated", "W8A4 SmoothQuant", "and better than SmoothQuant"),
  ("W4A4 rotated, GPTQ", "W4A4 rotated", "GPTQ works behind rotations"),
)
"""(row, what it is held against, what is claimed)."""


def repaired(rows: Rows) -> list[Verdict]:
  """Returns whether each repair at least halves the divergence; GPTQ lowers it.

  Args:
    rows: measured, by name.
  """
  out = []
  for name, other, claim in CLAIMS:
    if not {name, other} <= rows.keys():
      continue
    after, before = rows[name]["kl"], rows[other]["kl"]
    share = 1.0 if "GPTQ" in name else 0.5
    found = f"KL {before:.4g} ({other}) to {after:.4g} ({name})"
    out.append(Verdict(claim, found, after < share * before))
  return out
