"""Measures ways to keep a model in few bits, beside each other.

  python -m experiments.quant_table --config=runs/quant/claims_equal_bits.gin \
      --workdir=DIR

A configuration is a `Table`: a model, a text that it did not see, and rows. A
row's number of bits is what its packed matrices take, everything counted; those
of 4.25 to 4.5 and of 3.25 to 3.5 bits are two bands whose rows compete. Each
row goes to DIR/rows/, and the same command again measures what is missing. Ends
with the table, verdicts, pareto.png and table.csv in DIR, and result.json,
whose content is the last line on stdout.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments import runtime

  runtime.prepare()

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import cli

FLAGS = cli.new_flags()

_CONFIG = flags.DEFINE_string(
  "config",
  None,
  "Gin file, here or under configs/, e.g. runs/quant/claims_equal_bits.gin.",
  flag_values=FLAGS,
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Where everything goes; made if missing.",
  flag_values=FLAGS,
)
_ONLY = flags.DEFINE_string(
  "only",
  "",
  "Regular expression: measure no other rows than those whose name it finds.",
  flag_values=FLAGS,
)
_SET = flags.DEFINE_multi_string(
  "set",
  [],
  "Gin binding, e.g. --set=MODEL='runs/tiny-lm'.",
  flag_values=FLAGS,
)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Measures what is missing; returns the result."""
  del argv
  cli.required(config=_CONFIG.value, workdir=_WORKDIR.value)
  cli.local(workdir=_WORKDIR.value)
  from experiments import config, quant_pictures, quant_study, runtime, tables
  from research.typing import UserError

  runtime.setup()
  read = config.read(_CONFIG.value, _SET.value, root=quant_study.Table)
  folder = pathlib.Path(_WORKDIR.value)
  rows = quant_study.measured(read.experiment, folder, _ONLY.value)
  if not rows:
    raise UserError(f"--only={_ONLY.value}: finds no row")
  lines = quant_study.table(rows)
  cli.say(f"\n{tables.text(tables.without_empty(lines))}\n")
  verdicts = [v for f in read.experiment.verdicts for v in f(rows)]
  for claim, found, holds in verdicts:
    cli.say(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}\n  {found}")
  tables.write_csv(folder / "table.csv", lines)
  name = pathlib.Path(_CONFIG.value).stem
  quant_pictures.pareto(rows, folder / "pareto.png", name)
  result = {
    "claims": [v._asdict() for v in verdicts],
    "rows": lines,
    "failed": {n: r["failed"] for n, r in rows.items() if "failed" in r},
    "tokens": max((r.get("tokens", 0) for r in rows.values()), default=0),
    "seconds": round(sum(r["seconds"] for r in rows.values())),
  }
  text = json.dumps(cli.plain(result), indent=2)
  (folder / "result.json").write_text(text + "\n")
  return result


if __name__ == "__main__":
  cli.run(main)
