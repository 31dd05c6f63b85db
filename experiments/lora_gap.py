"""How far adapters stay behind full training: the results of a sweep.

  python -m experiments.lora_gap --sweep=DIR

DIR is the folder of a sweep, such as sweeps/lora_seeds_smollm2.gin, in which
one unit trains everything. Each arm (the bindings, less seed and rate) stands
at the rate with the least mean perplexity. Prints a table: parameters,
perplexity, how far above full training in nats a token, paired by seed, and
the share of full training's gain; draws the gaps against parameters in
DIR/gap.png. ± is Student's 95% over seeds. The last line on stdout is a JSON
object.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments import runtime

  runtime.prepare()

import csv
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import cli, lora_verdicts, tables
from research.typing import UserError

FLAGS = cli.new_flags()

_SWEEP = flags.DEFINE_string(
  "sweep", None, "Folder of a sweep that has run.", flag_values=FLAGS
)

RATE, SEED, WHOLE = "LEARNING_RATE", "SEED", "full"
BEFORE, AFTER = "perplexity_before", "perplexity_after"
COUNT, TOTAL = "trainable_parameters", "total_parameters"


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Prints the table; draws the picture."""
  del argv
  cli.required(sweep=_SWEEP.value)
  folder = pathlib.Path(_SWEEP.value)
  lines = table(read(folder / "results.csv"))
  cli.say(tables.text(lines))
  draw(lines, folder / "gap.png")
  return {"arms": lines, "picture": str(folder / "gap.png")}


def read(path: pathlib.Path) -> list[dict[str, str]]:
  """Returns the units of a sweep that are done.

  Raises:
    UserError: there is no such table, none is done, or a column is missing.
  """
  try:
    with path.open(encoding="utf-8", newline="") as file:
      rows = [r for r in csv.DictReader(file) if r.get("status") == "done"]
  except OSError as error:
    raise UserError(
      f"{path}: cannot be read ({error.strerror}).\nExpected the folder of a"
      " sweep that has run: python -m experiments.sweep --workdir=..."
    ) from error
  if not rows:
    raise UserError(f"{path}: no unit is done.")
  missing = {RATE, SEED, BEFORE, AFTER, COUNT, TOTAL} - set(rows[0])
  if missing:
    raise UserError(f"{path}: has no column {', '.join(sorted(missing))}.")
  return rows


def table(rows: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
  """Returns a line an arm, full training first, then by parameters.

  Args:
    rows: units, as `read` returns them.

  Raises:
    UserError: none trains everything, or an arm has other seeds than that one.
  """
  arms: dict[str, dict[float, dict[str, Mapping[str, str]]]] = {}
  for row in rows:
    by_rate = arms.setdefault(_name(row), {})
    by_rate.setdefault(float(row[RATE]), {})[row[SEED]] = row
  if WHOLE not in arms:
    raise UserError(
      f"sweep: no unit trains all {rows[0][TOTAL]} parameters, expected one to"
      " compare with."
    )
  best = {name: _best(by_rate) for name, by_rate in arms.items()}
  _, whole = best[WHOLE]
  lines = [_line(n, rate, units, whole) for n, (rate, units) in best.items()]
  return sorted(lines, key=lambda x: (x["arm"] != WHOLE, x["trained %"]))


def _name(row: Mapping[str, str]) -> str:
  """Returns what a unit's arm is called: its method and rank."""
  if row[COUNT] == row[TOTAL]:
    return WHOLE
  method = re.search(r"(\w+)\(\)", row.get("METHOD") or "LoRA()")
  rank = row.get("RANK")
  return (method[1] if method else "LoRA") + (f" r={rank}" if rank else "")


def _best(by_rate):
  """Returns (rate, units by seed) of the least mean perplexity."""

  def mean(item):
    return np.mean([math.log(float(r[AFTER])) for r in item[1].values()])

  return min(by_rate.items(), key=mean)


def _line(name, rate, units, whole) -> dict[str, Any]:
  if set(units) - set(whole):
    raise UserError(
      f"sweep: {name} has seeds {', '.join(sorted(units))}, full training"
      f" {', '.join(sorted(whole))}; run those that are missing."
    )
  seeds = sorted(units)

  def nats(which, column):
    return np.array([math.log(float(which[s][column])) for s in seeds])

  loss, reached = nats(units, AFTER), nats(whole, AFTER)
  gain = nats(whole, BEFORE) - reached
  first = units[seeds[0]]
  gap = lora_verdicts.mean(loss - reached)
  return {
    "arm": name,
    "trained %": 100 * int(first[COUNT]) / int(first[TOTAL]),
    "rate": rate,
    "seeds": len(seeds),
    "perplexity": str(lora_verdicts.mean(np.exp(loss))),
    "above full": gap.value if name != WHOLE else None,
    "±": gap.half if name != WHOLE else None,
    "closed %": 100 * (1 - float(np.sum(loss - reached) / np.sum(gain))),
  }


def draw(lines: Sequence[Mapping[str, Any]], picture: pathlib.Path) -> None:
  """Draws gaps against the share of parameters that is trained."""
  from research.training import plots

  figure = plots.figure(7, 4.5)
  axes = figure.subplots()
  low = [line for line in lines if line["arm"] != WHOLE]
  ranks = [x for x in low if x["arm"].startswith("LoRA ")]
  axes.plot(
    [x["trained %"] for x in ranks],
    [x["above full"] for x in ranks],
    color="0.7",
    zorder=1,
  )
  for i, x in enumerate(low):
    half = x["±"] if math.isfinite(x["±"]) else 0
    place = (x["trained %"], x["above full"])
    color = plots.style(i)["color"]
    axes.errorbar(*place, half, fmt="o", capsize=3, color=color, label=x["arm"])
  axes.axhline(0, color="0.5", linewidth=1)
  axes.set(
    xscale="log",
    xlabel="trained, % of the parameters",
    ylabel="above full training, nats a token",
    title="full training is 0",
  )
  axes.grid(alpha=0.3)
  axes.legend(frameon=False)
  plots.save(figure, picture)


if __name__ == "__main__":
  cli.run(main)
