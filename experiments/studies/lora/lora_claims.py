"""Checks claims of LoRA's story: arms with swept rates, tables and verdicts.

  python -m experiments.studies.lora.lora_claims \
      --config=runs/lora/claims_capacity.gin --workdir=DIR

A configuration is a `study.Study`. Every arm's rates are swept with every seed;
its row goes to DIR/arms/, and the same command again runs what is missing;
--only runs some of them. Ends with a table, verdicts, sweep.png and
tradeoff.png in DIR, and result.json, whose content is the last line on stdout.
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
  "runs/lora/claims_capacity.gin",
  "study.Study.steps=20 for a trial",
  "DoRA",
)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Runs what is missing; returns the result."""
  del argv
  from experiments.core import tables
  from experiments.notebooks import lora_pictures
  from experiments.studies import study as studies
  from experiments.studies.lora import lora_verdicts
  from research.typing import UserError

  read = _GIVEN.read(studies.Study)
  folder = _GIVEN.folder
  claims.claimed(folder, read.text)
  (folder / "arms").mkdir(exist_ok=True)
  study = read.experiment
  rows = _rows(study, folder, _GIVEN.wanted)
  if not rows:
    raise UserError(f"--only={_GIVEN.only.value}: finds no arm")
  missing = [arm.name for arm in study.arms if arm.name not in rows]

  # --- what they say ---
  lines = lora_verdicts.table(rows)
  cli.say(f"\n{tables.text(lines)}\n")
  if missing:
    cli.say(f"{len(missing)} arms are missing; verdicts need them all")
    return {"arms": lines, "missing": missing}
  said = claims.tell(study.verdicts(rows))
  lora_pictures.sweep(rows, folder / "sweep.png", _GIVEN.name)
  if all("known" in row for row in rows.values()):
    lora_pictures.tradeoff(rows, folder / "tradeoff.png")
  result = {
    "claims": said,
    "arms": lines,
    "not_inside": [n for n, row in rows.items() if not row["inside"]],
    "seconds": round(sum(row["seconds"] for row in rows.values())),
  }
  return claims.finish(folder, result)


def _rows(
  study: Any, folder: pathlib.Path, wanted: re.Pattern[str]
) -> dict[str, Any]:
  """Returns arms' rows, from the folder or, where they match, new runs."""
  kept = claims.Kept(folder / "arms")
  todo = [
    arm
    for arm in study.arms
    if arm.name not in kept and wanted.search(arm.name)
  ]
  if todo:
    from experiments.studies import population

    on = population.ground(study, _base(study, folder))
    before = population.before(on)
    cli.say(f"{len(todo)} arms to run; before: {cli.plain(before)}")
    for arm in todo:
      start = time.perf_counter()
      row = population.sweep(study, arm, on) | {"before": before}
      row["trained"] -= _still(study, arm, on)
      row["seconds"] = time.perf_counter() - start
      kept.keep(arm.name, row)
      best = row["best"]
      cli.say(
        f"{arm.name}: {min(map(_mean, row['heldout'])):.3f}, best of"
        f" {len(row['ks'])} rates 10^({row['ks'][best]}/2)"
        f" ({row['seconds']:.0f} s)"
      )
  rows = [kept[arm.name] for arm in study.arms if arm.name in kept]
  return {row["arm"]: row for row in rows}


def _still(study: Any, arm: Any, on: Any) -> int:
  """Returns how many numbers the optimizer sees and leaves where they are.

  LoRA-FA's needs `a` to know how b should move.
  """
  if "/fixed/" not in arm.trainable:
    return 0
  from experiments.studies import population
  from research import tree

  seen, _ = tree.partition(population.begun(study, arm, on, 0), arm.trainable)
  fixed, _ = tree.partition(seen, "/fixed/")
  return tree.count(fixed)


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values)


def _base(study: Any, folder: pathlib.Path) -> Any:
  """Returns the base that all arms share, trained once; None for none."""
  if study.known is None:
    return None
  import numpy as np

  from experiments.studies import population
  from research import tree

  note = folder / "base.npz"
  if not note.exists():
    cli.say("training the base")
    found = population.learned(study)
    np.savez(note, **dict(tree.flatten_paths(found)))
  saved = np.load(note, allow_pickle=False)
  like = study.model.load().params
  return tree.map_paths(lambda path, _: saved[path], like)


if __name__ == "__main__":
  cli.run(main)
