"""Checks what is claimed of masked diffusion language models, on tiny ones.

  python -m experiments.studies.diffusion.diffusion_claims \
      --config=runs/llada/claims_reversal.gin --workdir=DIR

A configuration is a `diffusion_study.Claims`, one study of several arms. Every
arm's row goes to DIR/arms/, and the same command again runs what is missing;
--only runs some of them. Ends with a table, verdicts, and pictures in DIR, and
result.json, whose content is the last line on stdout.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any

from experiments.core import cli
from experiments.studies import claims

FLAGS = cli.new_flags()

_GIVEN = claims.define(
  FLAGS,
  "runs/llada/claims_reversal.gin",
  "diffusion_study.Tiny.width=32 for a trial",
  "seed 0",
)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Runs what is missing; returns the result."""
  del argv
  from experiments.core import tables
  from experiments.studies.diffusion import diffusion_study

  read = _GIVEN.read(diffusion_study.Claims)
  study, folder = read.experiment.study, _GIVEN.folder
  claims.claimed(folder, read.text)
  rows = _rows(study, folder / "arms", _GIVEN.wanted)
  missing = [arm for arm in study.arms if arm not in rows]
  if missing:
    cli.say(f"{len(missing)} arms are missing; verdicts need them all")
    return {"arms": list(rows), "missing": missing}

  # --- what they say ---
  lines = study.table(rows)
  cli.say(f"\n{tables.text(lines)}\n")
  said = claims.tell(study.verdicts(rows))
  study.draw(rows, folder, _GIVEN.name)
  result = {
    "claims": said,
    "table": lines,
    "seconds": round(sum(row["seconds"] for row in rows.values())),
  }
  return claims.finish(folder, result)


def _rows(
  study: Any, folder: pathlib.Path, wanted: re.Pattern[str]
) -> dict[str, Any]:
  """Returns arms' rows, from the folder or, where they match, new runs."""
  rows: dict[str, Any] = {}
  kept = claims.Kept(folder)
  for arm in study.arms:
    if arm not in kept:
      if not wanted.search(arm):
        continue
      start = time.perf_counter()
      row = dict(study.row(arm, rows))
      row["seconds"] = time.perf_counter() - start
      kept.keep(arm, row)
      cli.say(f"{arm}: {row['seconds']:.0f} s")
    rows[arm] = kept[arm]
  return rows


if __name__ == "__main__":
  cli.run(main)
