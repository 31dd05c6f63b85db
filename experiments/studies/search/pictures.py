"""Pictures of searches: accuracy against FLOPs."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.studies import pictures
from experiments.studies.protocol import Row
from experiments.studies.search import systems
from experiments.studies.search.systems import System
from research.training.reports import plots


def against_flops(
  points: Mapping[System, Sequence[Row]],
  curves: Mapping[System, Sequence[Row]],
  path: pathlib.Path,
  title: str,
) -> None:
  """Draws systems as points, and pools of samples as curves over budgets.

  Args:
    curves: pools of independent samples: of each there is a curve of what an
      exact final check would reach (pass@k), and where steps are scored, one of
      best-of-k by the product of scores.
  """
  drawn = plots.figure(9, 5.5)
  axes = drawn.subplots()
  for i, (system, rows) in enumerate(curves.items()):
    _curves(axes, system, rows, plots.style(i))
  labels = {}
  for system, rows in points.items():
    if not rows or system.checked is not None:
      continue
    x = sum(systems.flops_of(system, rows)) / 1e6
    each = systems.each_of(system, rows).mean(axis=1)
    axes.plot(x, 100 * each.mean(), "o", color="black", markersize=4)
    axes.vlines(x, 100 * each.min(), 100 * each.max(), color="black", lw=0.8)
    labels[system.name] = (x, 100 * float(each.mean()))
  axes.set(
    xlabel="MFLOP a problem, verifier included",
    ylabel="right, %",
    xscale="log",
    title=title,
  )
  axes.legend(frameon=False, fontsize=8)
  axes.grid(alpha=0.3)
  drawn.draw_without_rendering()  # limits are final from here on
  pictures.label_points(axes, labels)
  plots.save(drawn, path)


def _curves(axes, system, rows, style) -> None:
  found = [row["estimates"] for row in rows if row.get("estimates")]
  if not found:
    return
  ks = found[0]["k"]
  names = {"pass": "-", "best_of/product": "--", "majority": ":"}
  for name, dashes in names.items():
    if not all(name in x for x in found):
      continue
    shares = np.array([[value for value, *_ in x[name]] for x in found])
    if name == "best_of/product":
      x = np.mean([x["flops"] for x in found], axis=0)
    else:  # the policy alone
      x = [
        systems.flops_of(System(step=system.step, checked=k), rows)[0]
        for k in ks
      ]
    label = {"pass": "exact check", "best_of/product": "best of k"}.get(
      name, name
    )
    axes.plot(
      np.array(x) / 1e6,
      100 * shares.mean(axis=0),
      dashes,
      label=f"{system.name}, {label}",
      color=style["color"],
      lw=1.2,
    )
