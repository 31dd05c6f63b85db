"""Importance matrices: what llama.cpp's encoders weigh errors by.

They are the squares of a matrix's inputs. A calibration text is read layer by
layer (`algorithms.calibrate`), and a tap sums the squares of what each matrix
multiplies. A file, as llama.cpp's `imatrix` writes it, has for each matrix the
sum of the squares of each of its inputs (`NAME.in_sum2`) and how many rows were
summed (`NAME.counts`).
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from research import weights
from research.interop import gguf
from research.interop.gguf import tensor_types
from research.interop.gguf.names import ROWS
from research.nn.transformer import Transformer
from research.quant.algorithms import calibrate
from research.taps.statistics import Magnitudes
from research.typing import Int, Params, UserError

NAMES = {row.path: row.name for row in ROWS if len(row.dims) == 2}
"""Path of a matrix in its layer -> GGUF's name of it."""

SUMS, COUNTS = ".in_sum2", ".counts"


@dataclasses.dataclass(frozen=True)
class Importances:
  """Sums over a calibration text.

  Attributes:
    squares: GGUF's name of a matrix -> sums of its inputs' squares, float32
      `[in]`.
    counts: name -> how many rows were summed.
    windows, length: of the text, in tokens.
    datasets: what the text was.
  """

  squares: Mapping[str, np.ndarray]
  counts: Mapping[str, float]
  windows: int = 0
  length: int = 0
  datasets: tuple[str, ...] = ()

  def means(self) -> dict[str, np.ndarray]:
    return {
      name: x / np.float32(self.counts[name])
      if self.counts[name]
      else np.ones_like(x)
      for name, x in self.squares.items()
    }


def write(path: str | os.PathLike, found: Importances) -> None:
  """Writes a file, whole or not at all."""
  metadata: dict[str, Any] = {
    "general.type": "imatrix",
    "imatrix.datasets": list(found.datasets),
    "imatrix.chunk_count": found.windows,
    "imatrix.chunk_size": found.length,
  }
  tensors = {}
  for name, x in found.squares.items():
    count = np.array([found.counts[name]], np.float32)
    for suffix, array in ((SUMS, x), (COUNTS, count)):
      raw = tensor_types.encode("F32", array)
      tensors[name + suffix] = gguf.Tensor("F32", array.shape, raw)
  gguf.write_gguf(path, metadata, tensors)


def read(path: str | os.PathLike) -> Importances:
  """Returns what a file has.

  Raises:
    UserError: it is damaged, or no importance matrix of dense layers.
  """
  file = gguf.open_gguf(path)
  kind = file.metadata.get("general.type")
  if kind != "imatrix":
    raise UserError(
      f"{path}: general.type is {kind!r}, expected 'imatrix'.\n"
      "Make one with experiments.imatrix or llama.cpp's imatrix."
    )
  squares, counts = {}, {}
  for name, tensor in file.tensors.items():
    if not name.endswith((SUMS, COUNTS)):
      raise UserError(f"{path}: tensor {name!r}: neither *{SUMS} nor *{COUNTS}")
    if tensor.type != "F32":
      raise UserError(
        f"{path}: tensor {name!r}: found type {tensor.type}, expected F32"
      )
    if tensor.data.size != 4 * max(tensor.shape):
      raise UserError(
        f"{path}: tensor {name!r}: found shape {list(tensor.shape)}, expected "
        "one row; experts are not supported"
      )
    x = tensor.decode().reshape(-1)
    if not np.isfinite(x).all() or (x < 0).any():
      raise UserError(f"{path}: tensor {name!r}: expected numbers from 0 on")
    if name.endswith(SUMS):
      squares[name.removesuffix(SUMS)] = x
    else:
      counts[name.removesuffix(COUNTS)] = float(np.rint(x[0]))
  if odd := squares.keys() ^ counts.keys():
    raise UserError(
      f"{path}: {sorted(odd)[0]!r} has sums or counts, expected both"
    )
  if not squares:
    raise UserError(f"{path}: no tensors, expected sums of squares")
  return Importances(
    squares,
    counts,
    _whole(file, path, "imatrix.chunk_count"),
    _whole(file, path, "imatrix.chunk_size"),
    tuple(map(str, file.metadata.get("imatrix.datasets") or ())),
  )


def _whole(file: gguf.GGUF, path: str | os.PathLike, key: str) -> int:
  found = file.metadata.get(key, 0)
  if not isinstance(found, int):
    raise UserError(f"{path}: {key} is {str(found)[:40]}, expected a number")
  return found


def collect(
  model: Transformer,
  params: Params,
  tokens: Int[np.ndarray, "N T"],
  batch: int = 4,
  dataset: str = "",
) -> Importances:
  """Returns the sums over all tokens, for every matrix of the layers.

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
  out = []
  for name, leaf in part.items():
    path = f"{prefix}{name}"
    if isinstance(leaf, dict) and not weights.is_weight(leaf):
      out += _matrices(leaf, f"{path}/")
    elif len(leaf.shape) >= 2:
      out.append(path)
  return out
