r"""Searches for solutions of a task's problems, and counts what it costs.

  python -m experiments.search --config=runs/search/chain_sum_smollm2.gin \
      --workdir=DIR

Writes the samples of each problem, with their steps, scores and verdicts, to
DIR/pool.jsonl as soon as they are done. The same command resumes a search, and
generates the same texts as without the interruption. DIR/result.json has the
result, which is also the last line on stdout, and estimates for smaller
budgets; DIR/traces.html shows steps coloured by their scores. With other values
of CHOICE, SELECT and N, the command chooses again from the pool, without
sampling:

  --set=CHOICE=@choose.Majority() --set=N=4
"""

if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from experiments.core import cli
from experiments.core.definers import definers

FLAGS = cli.new_flags()
define = definers(FLAGS)

_CONFIG = cli.define_config(FLAGS, "runs/search/chain_sum_smollm2.gin")
_WORKDIR = define.text(
  "workdir", "The search's working directory; created if missing."
)
_SET = cli.define_set(FLAGS, "N=4")
_SHOW = define.integer(
  "show",
  "Print the samples of this many problems, with steps coloured by score.",
  default=0,
  lower_bound=0,
)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Searches what is missing; returns the result."""
  del argv
  cli.required(config=_CONFIG.value, workdir=_WORKDIR.value)
  cli.local(workdir=_WORKDIR.value)
  cli.directory(workdir=_WORKDIR.value)
  folder = pathlib.Path(_WORKDIR.value)
  # A pool that is complete does not need the runs of its models.
  has_pool = (folder / "pool.jsonl").exists()
  unneeded = r".*\.workdir" if has_pool else ""
  cli.run_file(
    _CONFIG.value, _SET.value, unneeded=unneeded, root="search_run.SearchRun"
  )
  from experiments.core import config, runtime
  from experiments.searching import display, running, search_run
  from research.training import preemption

  runtime.setup()
  read = config.read(_CONFIG.value, _SET.value, root=search_run.SearchRun)
  with preemption.handling_signals():
    pool = running.complete(read.experiment, folder, read.text)
    for searched in pool[: _SHOW.value]:
      cli.say(display.for_terminal(searched, sys.stdout.isatty()) + "\n")
    return running.report(read.experiment, pool, folder)


if __name__ == "__main__":
  cli.run(main)
