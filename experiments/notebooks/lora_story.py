"""The tables and pictures of `colab/lora.ipynb`: capacity and spectra.

Rows are those of `lr_grid.sweep`, an arm each.
"""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.studies.protocol import Row
from research import tree, weights
from research.lora import wrap
from research.typing import Float, Params, UserError


def ranking(rows: Mapping[str, Row]) -> list[dict[str, Any]]:
  """Returns a line an arm: what it trained, and what came of it.

  The loss is held out, the rate chosen on other documents.
  """
  full = rows["full"]["trained"]
  return [
    {
      "arm": name,
      "trained %": 100 * row["trained"] / full,
      "rate": 10 ** (row["ks"][row["best"]] / 2),
      "loss": float(np.mean(row["heldout"][row["best"]])),
      "loss on the old": float(np.mean(row["known"][row["best"]])),
      "rank of 90%": float(np.mean(row["rank90"][row["best"]])),
    }
    for name, row in rows.items()
  ]


def capacity(rows: Mapping[str, Row]) -> Any:
  """Returns a figure: losses against rates, and against parameters."""
  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
  for name, row in rows.items():
    rates = [10 ** (k / 2) for k in row["ks"]]
    left.semilogx(rates, np.mean(row["heldout"], 1), "o-", label=name)
  lines = ranking(rows)
  worst = max(line["loss"] for line in lines)
  best = min(line["loss"] for line in lines)
  margin = max(worst - best, 1e-3)
  left.set(
    xlabel="learning rate",
    ylabel="held-out loss",
    ylim=(best - 0.2 * margin, worst + 2 * margin),
  )
  left.legend(frameon=False)
  right.semilogx(
    [x["trained %"] for x in lines], [x["loss"] for x in lines], "o"
  )
  for line in lines:
    place = (line["trained %"], line["loss"])
    right.annotate(line["arm"], place, (4, 4), textcoords="offset points")
  right.margins(0.2)  # names stay inside of the frame
  right.set(xlabel="trained, % of full", ylabel="loss at the best rate")
  return figure


def spectrum(
  before: Params, after: Params, address: str
) -> Float[np.ndarray, " S"]:
  """Returns the singular values of a matrix's change, largest first."""
  changed, base = (
    np.asarray(weights.dense(_matrix(params, address)), np.float64)
    for params in (after, before)
  )
  return np.linalg.svd(changed - base, compute_uv=False)


def _matrix(params: Params, address: str) -> Any:
  _, number, path = address.split("/", 2)
  for i, layer in enumerate(tree.layers(params)):
    if i == int(number) and path in (found := dict(wrap.leaves(layer))):
      return found[path]
  raise UserError(f"{address}: no such matrix")


def spectra(runs: Mapping[str, tuple[Params, Params]], address: str) -> Any:
  """Returns a figure of the singular values of one matrix's changes."""
  figure, axis = plt.subplots(figsize=(7, 4))
  for name, (before, after) in runs.items():
    s = spectrum(before, after, address)
    axis.semilogy(range(1, len(s) + 1), s / s[0], ".-", label=name)
  axis.set(
    xlabel="singular value",
    ylabel="of the change, largest is 1",
    ylim=(1e-4, 1.5),
    title=address,
  )
  axis.legend(frameon=False)
  return figure
