r"""Runs a study: arms one by one, then a table, verdicts and pictures.

  python -m experiments.study --config=runs/lora/claims_capacity.gin \
      --workdir=DIR

An arm is one variant with one seed. Its row is stored in DIR/arms/; the same
command again runs the arms that are missing, and --only runs some of them. Rows
from other settings are refused. Once all arms are done, the command writes
verdicts, plots and result.json to DIR. The same command in several processes at
once, of one machine or of several that share DIR, divides the arms among them
where these do not need each other. --render stores that result next to the
run file and updates the tables in the documentation. The last line on stdout is
the result.
"""

if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

import contextlib
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.core import cli
from experiments.core.definers import definers
from research.errors import UserError

FLAGS = cli.new_flags()
define = definers(FLAGS)

_CONFIG = cli.define_config(FLAGS, "runs/lora/claims_capacity.gin")
_WORKDIR = define.text(
  "workdir", "The study's working directory; created if missing."
)
_SET = cli.define_set(FLAGS)
_ONLY = define.text(
  "only",
  "Regular expression: run only arms whose names contain a match, e.g."
  " --only='seed 0'.",
  default="",
)
_RENDER = define.switch(
  "render",
  "Store the result under configs/ and rewrite the pages that show it.",
)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Runs what is missing; returns the result."""
  del argv
  cli.required(config=_CONFIG.value, workdir=_WORKDIR.value)
  cli.local(workdir=_WORKDIR.value)
  cli.directory(workdir=_WORKDIR.value)
  cli.run_file(_CONFIG.value, _SET.value, root="protocol.Run")
  only = _pattern(_ONLY.value)
  from experiments.core import config, runtime, tables
  from experiments.studies import protocol, results
  from research.io import folders
  from research.training import preemption

  runtime.setup()
  read = config.read(_CONFIG.value, _SET.value, root=protocol.Run)
  study, folder = read.experiment.study, pathlib.Path(_WORKDIR.value)
  if _RENDER.value:
    results.path_of(_CONFIG.value)
  _claim(folder, read.text)

  # --- arms ---
  with preemption.handling_signals():  # an arm that trains saves its step
    stored = _run(study, folder, only)
  rows = {arm: found["row"] for arm, found in stored.items()}
  missing = [arm for arm in study.arms if arm not in rows]

  # --- what they say ---
  every = [[]] if missing and study.needs_all else study.tables(rows)
  for lines in filter(None, every):
    cli.say(f"\n{tables.text(tables.without_empty(results.shown(lines)))}\n")
  shown = [results.as_table(lines) for lines in every]
  if missing:
    cli.say(f"missing: {', '.join(missing)}. Verdicts need all arms.")
    return {"arms": list(rows), "missing": missing, "tables": shown}
  verdicts = _verdicts(study, rows)
  study.plot(rows, folder, pathlib.Path(_CONFIG.value).stem)
  result = {
    "command": _command(),
    "commit": results.commit(),
    "machine": results.machine(),
    "versions": results.versions(),
    "seeds": study.seeds,
    "seconds": round(sum(found["seconds"] for found in stored.values())),
    "verdicts": [
      {"claim": v.claim, "found": v.found, "verdict": v.state} for v in verdicts
    ],
    "tables": shown,
    "arms": {n: round(found["seconds"], 1) for n, found in stored.items()},
  }
  commits = sorted({str(found["commit"]) for found in stored.values()})
  result |= {"row_commits": commits} if commits != [result["commit"]] else {}
  failed = {n: row["failed"] for n, row in rows.items() if "failed" in row}
  result |= {"failed": failed} if failed else {}
  file = folder / "result.json"
  with folders.writing(file):
    folders.write_text(file, results.json_text(result))
  if _RENDER.value:
    for path in results.render(_CONFIG.value, result):
      cli.say(f"wrote {path}")
  return result


def _pattern(text: str) -> re.Pattern[str]:
  try:
    return re.compile(text)
  except re.error as error:
    raise UserError(
      f"--only={text}: is no regular expression ({error}); expected e.g. an"
      " arm's name"
    ) from error


def _claim(folder: pathlib.Path, text: str) -> None:
  """Makes the folder, and leaves the configuration in it.

  Raises:
    UserError: it is another command's.
  """
  from research.io import folders

  folder.mkdir(parents=True, exist_ok=True)
  note = folder / "config.gin"
  if note.exists() and "Run.study = " not in note.read_text("utf-8"):
    raise UserError(
      f"{note}: found no study in it, expected protocol.Run.study: another"
      " command, or an older version of this one, wrote this folder.\n"
      "Use another --workdir."
    )
  folders.write_text(note, text)


def _run(
  study: Any, folder: pathlib.Path, only: re.Pattern[str]
) -> dict[str, dict[str, Any]]:
  """Returns what is stored of each arm, after running what is missing."""
  from experiments.studies import protocol, results

  arms = list(study.arms)
  if not any(map(only.search, arms)):
    raise UserError(
      f"--only={only.pattern}: matches no arm; arms: {', '.join(arms)}"
    )
  store = protocol.Store(folder / "arms")
  stored: dict[str, dict[str, Any]] = {}
  cli.say(f"checking the settings of {len(arms)} arms")
  settings = {arm: study.settings(arm) for arm in arms}
  # Rows of other settings are refused before anything runs.
  for arm in arms:
    if found := store.read(arm, settings[arm]):
      stored[arm] = found
  todo = [arm for arm in arms if arm not in stored and only.search(arm)]
  shared = study.prepare(folder) if todo else None
  commit, count = results.commit(), len(todo)
  while todo:
    with _next(study, store, todo) as arm:
      # Another process may have stored it since.
      found = store.read(arm, settings[arm])
      if found is None:
        cli.say(f"{arm} ({count - len(todo) + 1} of {count}) ...")
        begin = time.perf_counter()
        before = {a: stored[a]["row"] for a in arms if a in stored}
        row = study.run(arm, before, shared)
        seconds = time.perf_counter() - begin
        store.write(arm, settings[arm], row, seconds=seconds, commit=commit)
        found = store.read(arm, settings[arm])
        assert found is not None
        cli.say(f"{arm}: {_summary(study, found['row'])} ({seconds:.0f} s)")
    stored[arm] = found
    todo.remove(arm)
  return {arm: stored[arm] for arm in arms if arm in stored}


@contextlib.contextmanager
def _next(study: Any, store: Any, todo: Sequence[str]) -> Iterator[str]:
  """Context of the next arm, which no other process runs meanwhile.

  Waits where each arm is run by another process, or needs one that is.
  """
  from research.training import preemption

  waits = False
  while True:
    for arm in todo:
      if not set(todo).isdisjoint(study.needs(arm)):
        continue
      with store.claimed(arm) as ours:
        if ours:
          yield arm
          return
    if not waits:
      cli.say("Waits for arms that another process runs.")
      waits = True
    preemption.leave_if_asked()
    time.sleep(1.0)


def _summary(study: Any, row: dict[str, Any]) -> str:
  return f"failed: {row['failed']}" if "failed" in row else study.summary(row)


def _verdicts(study: Any, rows: dict[str, Any]) -> list[Any]:
  """Returns the verdicts, and says them; one seed decides nothing."""
  found = study.verdicts(rows)
  if study.seeds == 1:
    found = [v._replace(holds=None) for v in found]
    cli.say("One seed decides nothing: every verdict is undecided.")
  for v in found:
    state = v.state if v.holds else v.state.upper()
    cli.say(f"{state}: {v.claim}\n  {v.found}")
  return found


def _command() -> str:
  """Returns the command that this one repeats."""
  given = [f"--set={binding}" for binding in _SET.value]
  parts = [f"--config={_CONFIG.value}", "--workdir=DIR", *given]
  return " ".join(["python -m experiments.study", *parts])


if __name__ == "__main__":
  cli.run(main)
