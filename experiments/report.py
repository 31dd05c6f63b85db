"""Compares runs: a table, the differences of their configurations, a plot.

  python -m experiments.report --workdir=runs/a,runs/b

Plots loss, throughput, learning rate and the share of each part of the time
(goodput) to report.png, in --out or else the first working directory. The
directory of a sweep counts as all of its units. The last line on stdout is JSON
with the numbers of the table.
"""

if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.core import cli
from experiments.core.definers import definers

FLAGS = cli.new_flags()
define = definers(FLAGS)

_WORKDIR = define.words(
  "workdir", "Working directories of runs, separated by commas."
)
_OUT = define.text(
  "out", "The directory of the plot; by default the first working directory."
)


SHOWN = 40
"""Lines of differences that are printed."""


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Compares; returns the numbers, which the command prints as JSON."""
  del argv
  cli.required(workdir=",".join(_WORKDIR.value))
  cli.local(workdir=",".join(_WORKDIR.value), out=_OUT.value)
  cli.directory(out=_OUT.value)
  from experiments.core import tables
  from experiments.sweeps import compare
  from research.training.reports import plot_runs

  runs = compare.load(_WORKDIR.value)
  rows = [run.row() for run in runs]
  cli.say(tables.text(tables.without_empty(rows)))
  found = compare.differences(runs)
  if found:
    cli.say("\nwhat differs:")
    cli.say(tables.text(compare.difference_rows(found, runs)[:SHOWN]))
    if len(found) > SHOWN:
      cli.say(f"({len(found)} bindings in all; the last line has each)")
  out = pathlib.Path(_OUT.value or _WORKDIR.value[0])
  out.mkdir(parents=True, exist_ok=True)
  picture = out / "report.png"
  plot_runs.compare([run.curves() for run in runs], picture)
  cli.say(f"\npicture: {picture}")
  return {"runs": rows, "differences": found, "picture": str(picture)}


if __name__ == "__main__":
  cli.run(main)
