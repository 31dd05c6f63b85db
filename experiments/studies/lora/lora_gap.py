"""How far adapters stay behind full training: the results of a sweep.

  python -m experiments.studies.lora.lora_gap --sweep=DIR

DIR is the folder of a sweep, such as sweeps/lora_seeds_smollm2.gin, in which
one unit trains everything. Each arm (the bindings, less seed and rate) stands
at the rate with the least mean loss on the validation documents, which are not
those whose perplexity is given; a * marks a rate at the edge of a grid of
several, beyond which a better one may lie. Prints a table: parameters as a
share of the base's, perplexity, how far above full training in nats a token,
paired by seed, and the share of full training's gain; then how far arms
are apart. Draws the gaps against parameters in DIR/gap.png. ± is
Student's 95% over seeds. The last line on stdout is a JSON object.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

import csv
import itertools
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments.core import cli, stats, tables
from research.typing import UserError

FLAGS = cli.new_flags()

_SWEEP = flags.DEFINE_string(
  "sweep", None, "Folder of a sweep that has run.", flag_values=FLAGS
)

RATE, SEED, WHOLE = "LEARNING_RATE", "SEED", "full"
LORA = "LoRA r="
BEFORE, AFTER = "perplexity_before", "perplexity_after"
CHOOSES = "validation/loss"
COUNT, TOTAL = "trainable_parameters", "total_parameters"


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Prints the table; draws the picture."""
  del argv
  cli.required(sweep=_SWEEP.value)
  folder = pathlib.Path(_SWEEP.value)
  rows = read(folder / "results.csv")
  lines, pairs = table(rows), differences(rows)
  cli.say(f"{tables.text(lines)}\n\n{tables.text(pairs)}")
  draw(lines, folder / "gap.png")
  picture = str(folder / "gap.png")
  return {"arms": lines, "apart": pairs, "picture": picture}


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
  missing = {RATE, SEED, BEFORE, AFTER, CHOOSES, COUNT, TOTAL} - set(rows[0])
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
  best = _arms(rows)
  _, _, whole = best[WHOLE]
  lines = [_line(n, *found, whole) for n, found in best.items()]
  return sorted(lines, key=lambda x: (x["arm"] != WHOLE, x["trained %"]))


def differences(rows: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
  """Returns how far ranks of LoRA are apart, and methods from LoRA's.

  Args:
    rows: as for `table`.

  Raises:
    UserError: as there, or two that are compared have no seed in common.
  """
  losses = {
    name: {seed: math.log(float(r[AFTER])) for seed, r in units.items()}
    for name, (_, _, units) in _arms(rows).items()
  }
  ranks = {
    name.partition(" ")[2]: name for name in losses if name.startswith(LORA)
  }
  order = sorted(ranks.values(), key=lambda n: int(n.removeprefix(LORA)))
  compared = [*itertools.pairwise(order)]
  for name in losses:
    rank = ranks.get(name.partition(" ")[2])
    if rank and rank != name:
      compared.append((name, rank))
  out = []
  for one, other in compared:
    both = set(losses[one]) & set(losses[other])
    if not both:
      raise UserError(
        f"sweep: {one} has seeds {', '.join(sorted(losses[one]))}, {other}"
        f" {', '.join(sorted(losses[other]))}, expected one in common; run"
        " those that are missing."
      )
    gap = stats.mean([losses[one][s] - losses[other][s] for s in sorted(both)])
    found = {"arm": one, "from": other, "nats": gap.value, "±": gap.half}
    out.append(found | {"told apart": abs(gap.value) > gap.half})
  return out


def _arms(rows):
  """Returns (rate, whether at an edge, units by seed) of each arm's best."""
  arms: dict[str, dict[float, dict[str, Mapping[str, str]]]] = {}
  for row in rows:
    by_rate = arms.setdefault(_name(row), {})
    by_rate.setdefault(float(row[RATE]), {})[row[SEED]] = row
  if WHOLE not in arms:
    raise UserError(
      f"sweep: no unit trains all {rows[0][TOTAL]} parameters, expected one to"
      " compare with."
    )
  return {name: _best(by_rate) for name, by_rate in arms.items()}


def _name(row: Mapping[str, str]) -> str:
  """Returns what a unit's arm is called: its method and rank."""
  if row[COUNT] == row[TOTAL]:
    return WHOLE
  method = re.search(r"(\w+)\(\)", row.get("METHOD") or "LoRA()")
  rank = row.get("RANK")
  return (method[1] if method else "LoRA") + (f" r={rank}" if rank else "")


def _best(by_rate):
  """Returns (rate, whether at an edge, units by seed) of the least loss."""

  def mean(rate):
    return np.mean([float(r[CHOOSES]) for r in by_rate[rate].values()])

  rate = min(by_rate, key=mean)
  edge = len(by_rate) > 1 and rate in (min(by_rate), max(by_rate))
  return rate, edge, by_rate[rate]


def _line(name, rate, edge, units, whole) -> dict[str, Any]:
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
  # An adapted model's own total has the adapter in it.
  first, base = units[seeds[0]], next(iter(whole.values()))[TOTAL]
  gap = stats.mean(loss - reached)
  closed = 1 - float(np.sum(loss - reached) / np.sum(gain))
  return {
    "arm": name,
    "trained %": 100 * int(first[COUNT]) / int(base),
    "rate": f"{rate:g}" + "*" * edge,
    "seeds": len(seeds),
    "perplexity": str(stats.mean(np.exp(loss))),
    "above full": gap.value if name != WHOLE else None,
    "±": gap.half if name != WHOLE else None,
    "closed %": 100 * closed,
    "± %": 100 * gap.half / float(np.mean(gain)) if name != WHOLE else None,
  }


def draw(lines: Sequence[Mapping[str, Any]], picture: pathlib.Path) -> None:
  """Draws gaps against the share of parameters that is trained."""
  from research.training.reports import plots

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
