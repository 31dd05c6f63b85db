"""What llama.cpp's encoders weigh errors by: the squares of a matrix's inputs.

A calibration text is read layer by layer (`algorithms.calibrate`), and a
tap sums the squares of what each matrix multiplies.
"""

from typing import Any

import numpy as np

from research import weights
from research.interop.gguf.gguf_imatrix import Importances
from research.interop.gguf.gguf_rows import ROWS
from research.nn.transformer import Transformer
from research.quant.algorithms import calibrate
from research.taps.statistics import Magnitudes
from research.typing import Int, Params, UserError

NAMES = {row.path: row.name for row in ROWS if len(row.dims) == 2}
"""Path of a matrix in its layer -> GGUF's name of it."""


def collect(
  model: Transformer,
  params: Params,
  tokens: Int[np.ndarray, "N T"],
  batch: int = 4,
  dataset: str = "",
) -> Importances:
  """Returns the sums over all tokens, for every matrix of the layers.

  Args:
    model: of dense layers.
    params: its parameters.
    tokens: windows of a text.
    batch: windows that are computed at a time.
    dataset: what the text is.

  Raises:
    UserError: a layer has experts.
  """
  squares: dict[str, np.ndarray] = {}
  counts: dict[str, float] = {}

  def visit(layer: int, own: Params, inputs: calibrate.LayerInputs) -> Params:
    paths = _matrices(own)
    for path in paths:
      if path not in NAMES:
        raise UserError(
          f"imatrix: layers/{layer}/{path} has no name in GGUF; expected a "
          "model of dense layers"
        )
    found = inputs.measure(own, paths, Magnitudes())
    for path, sums in found.items():
      name = f"blk.{layer}.{NAMES[path]}"
      squares[name] = np.asarray(sums["squares"], np.float32)
      counts[name] = float(sums["n"][0])
    return own

  calibrate.walk(model, params, tokens, visit, batch, "old")
  named = (dataset,) if dataset else ()
  windows, length = tokens.shape
  return Importances(squares, counts, windows, length, named)


def _matrices(part: Any, prefix: str = "") -> list[str]:
  """Returns the paths of a layer's matrices."""
  out = []
  for name, leaf in part.items():
    path = f"{prefix}{name}"
    if isinstance(leaf, dict) and not weights.is_weight(leaf):
      out += _matrices(leaf, f"{path}/")
    elif len(leaf.shape) >= 2:
      out.append(path)
  return out
