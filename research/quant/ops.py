"""Table of activation ops by class name, for checkpoints."""

from collections.abc import Mapping

from research.quant.activations import Op, Round, RoundFloat
from research.quant.algorithms.rotate import Hadamard
from research.quant.llm_int8 import Outliers

OPS: Mapping[str, type[Op]] = {
  kind.__name__: kind for kind in (Op, Round, RoundFloat, Hadamard, Outliers)
}
"""Class name -> class that `InputTensor.op` may have."""
