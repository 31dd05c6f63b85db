"""Trains models of several widths, and keeps each in several bits.

  python -m experiments.studies.quant.quant_ladder_table \
      --config=runs/quant/claims_ladder.gin --workdir=DIR

A configuration is a `Ladder`. Asks which is better at equal bytes: more weights
in fewer bits, or fewer in more. What is trained and measured stays in DIR, and
the same command again does what is missing. Ends with the table, verdicts,
ladder.png and table.csv in DIR, and result.json, whose content is the last
line on stdout.
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
  FLAGS, "runs/quant/claims_ladder.gin", "STEPS=400", "w64-s0"
)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Trains and measures what is missing; returns the result."""
  del argv
  from experiments.core import tables
  from experiments.notebooks import quant_pictures
  from experiments.studies.quant import quant_ladder
  from research.typing import UserError

  ladder = _GIVEN.read(quant_ladder.Ladder).experiment
  folder = _GIVEN.folder
  points = quant_ladder.measured(ladder, folder, _GIVEN.wanted)
  if not points:
    raise UserError(f"--only={_GIVEN.only.value}: finds no model")
  lines = quant_ladder.table(points)
  cli.say(f"\n{tables.text(tables.without_empty(lines))}\n")
  said = claims.tell(v for f in ladder.verdicts for v in f(points))
  tables.write_csv(folder / "table.csv", lines)
  quant_pictures.ladder(lines, folder / "ladder.png", _GIVEN.name)
  result = {
    "claims": said,
    "rows": lines,
    "tokens": points[0]["tokens"],
    "seconds": round(sum(p["seconds"] for p in points)),
  }
  return claims.finish(folder, result)


if __name__ == "__main__":
  cli.run(main)
