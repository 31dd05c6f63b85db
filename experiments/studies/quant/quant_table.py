"""Measures ways to keep a model in few bits, beside each other.

  python -m experiments.studies.quant.quant_table \
      --config=runs/quant/claims_equal_bits.gin --workdir=DIR

A configuration is a `Table`: a model, a text that it did not see, and rows. A
row's number of bits is what its packed matrices take, everything counted; those
of 4.25 to 4.5 and of 3.25 to 3.5 bits are two bands whose rows compete. Each
row goes to DIR/rows/, and the same command again measures what is missing. Ends
with the table, verdicts, pareto.png and table.csv in DIR, and result.json,
whose content is the last line on stdout.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

from collections.abc import Sequence
from typing import Any

from experiments.core import cli
from experiments.studies import claims

FLAGS = cli.new_flags()

_GIVEN = claims.define(
  FLAGS, "runs/quant/claims_equal_bits.gin", "MODEL='runs/tiny-lm-900'", "GPTQ"
)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Measures what is missing; returns the result."""
  del argv
  from experiments.core import tables
  from experiments.notebooks import quant_pictures
  from experiments.studies.quant import quant_study
  from research.typing import UserError

  read = _GIVEN.read(quant_study.Table)
  folder = _GIVEN.folder
  rows = quant_study.measured(read.experiment, folder, _GIVEN.wanted)
  if not rows:
    raise UserError(f"--only={_GIVEN.only.value}: finds no row")
  lines = quant_study.table(rows)
  cli.say(f"\n{tables.text(tables.without_empty(lines))}\n")
  verdicts = [v for f in read.experiment.verdicts for v in f(rows)]
  said = claims.tell(verdicts)
  tables.write_csv(folder / "table.csv", lines)
  quant_pictures.pareto(rows, folder / "pareto.png", _GIVEN.name)
  result = {
    "claims": said,
    "rows": lines,
    "failed": {n: r["failed"] for n, r in rows.items() if "failed" in r},
    "tokens": max((r.get("tokens", 0) for r in rows.values()), default=0),
    "seconds": round(sum(r["seconds"] for r in rows.values())),
  }
  return claims.finish(folder, result)


if __name__ == "__main__":
  cli.run(main)
