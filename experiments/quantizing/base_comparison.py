"""A quantized model beside the one it was made from: `evaluate --base=`."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.converting.conversion import bytes_on_disk
from experiments.core import cli, tables
from research.data.sources import PydocTopics
from research.generation import perplexity
from research.interop import load
from research.quant.reports import compare, report_errors
from research.text import special_tokens
from research.typing import UserError

WORST = 12
"""Matrices that are shown."""


def compare_with_base(
  model: str,
  base: str,
  text: str | None = None,
  window: int = 512,
  max_windows: int | None = 8,
  batch: int = 1,
  layers: bool = True,
) -> dict[str, Any]:
  """Returns how `model` differs from `base`, and what it takes.

  Args:
    model, base: what `--model=` takes; quantized weights stay packed.
    text: that both read, in windows from its start on; None for the topics of
      the Python reference that this project holds out.
    window: tokens read together, besides those that every row of the model
      begins with; fewer where its context has no room for both.
    layers: whether errors are measured matrix by matrix, which is shown.

  Raises:
    UserError: there is no such model, no tokenizer, or too little text.
  """
  cli.loading(model, base)
  ours, theirs = (load.load_model(x, packed="any") for x in (model, base))
  tokenizer = ours.tokenizer or theirs.tokenizer
  if tokenizer is None:
    raise UserError(f"{model}: found no tokenizer in it, nor in {base}")
  if text is None:
    text = "\n\n".join(PydocTopics("heldout"))
  first = special_tokens.from_tokenizer(tokenizer).row_begin
  for context in (x.model.max_positions for x in (ours, theirs)):
    window = min(window, (context or window + len(first)) - len(first))
  cut = perplexity.windows(tokenizer.encode(text), window, max_windows)
  whole = [[*first, *w] for w in cut if len(w) == window]
  tokens = np.asarray(whole, np.int32)
  reference = compare.base_outputs(theirs.model, theirs.params, tokens, batch)
  found = compare.compare(reference, ours.model, ours.params)
  sizes = report_errors.sizes(ours.params)
  out = dataclasses.asdict(found) | dataclasses.asdict(sizes)
  out |= {"disk_bytes": on_disk(model), "base_disk_bytes": on_disk(base)}
  out |= {"windows": len(tokens), "window": window}
  if layers and sizes.packed_weights:
    matrices = report_errors.errors(
      ours.model, theirs.params, ours.params, tokens[:1]
    )
    cli.say(worst(matrices))
    out |= overall(matrices)
  return out | {"model": model, "base": base}


def overall(matrices: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
  """Returns medians over matrices, and the worst one.

  `outliers` has the median over matrices of the largest over the mean
  magnitude, of inputs and of weights, and of the inputs of each kind of matrix.
  """
  worst = max(matrices, key=lambda a: matrices[a]["output"])
  peak = max(matrices, key=lambda a: matrices[a]["inputs"])
  inputs: dict[str, list[float]] = {}
  for address, row in matrices.items():
    for kind in "inputs", address.rpartition("/")[2]:
      inputs.setdefault(kind, []).append(row["inputs"])

  def median(name: str) -> float:
    return float(np.median([row[name] for row in matrices.values()]))

  return {
    "output_error": median("output"),
    "weight_error": median("weight"),
    "worst_error": matrices[worst]["output"],
    "worst": worst,
    "largest_inputs": matrices[peak]["inputs"],
    "largest_at": peak,
    "outliers": {"weights": median("weights")}
    | {kind: float(np.median(x)) for kind, x in inputs.items()},
  }


def on_disk(name: str) -> int:
  """Returns the bytes of a model's file, or of all files in its directory."""
  return bytes_on_disk(pathlib.Path(load.locate(name)))


def worst(matrices: Mapping[str, Mapping[str, float]]) -> str:
  """Returns a table of the matrices whose outputs err most."""
  order = sorted(matrices, key=lambda a: -matrices[a]["output"])
  names = {
    "output": "output error",
    "output_all": "of all tokens",
    "weight": "weight error",
    "inputs": "inputs' max/mean",
    "weights": "weights' max/mean",
  }
  rows = [
    {"matrix": a} | {said: matrices[a][key] for key, said in names.items()}
    for a in order[:WORST]
  ]
  more = len(order) - len(rows)
  return tables.text(rows) + (f"\n({more} more err less)" if more else "")
