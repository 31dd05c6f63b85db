r"""Searches for solutions of a task's problems, and counts what it costs.

  python -m experiments.search --config=runs/search/chain_sum_smollm2.gin \
      --workdir=DIR

Samples of every problem go to DIR/pool.jsonl, with their steps, scores and
verdicts, as soon as they are there; the same command again goes on where it was
stopped, with the same texts. DIR/result.json has estimates for smaller budgets
besides what the last line on stdout says, and DIR/traces.html shows steps
coloured by their scores. Other values of choice and n choose again from the
pool, and sample nothing:

  --set=CHOICE=@choose.Majority() --set=N=4
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.core import cli

FLAGS = cli.new_flags()

_CONFIG = cli.define_config(FLAGS, "runs/search/chain_sum_smollm2.gin")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where everything goes; made if missing.", flag_values=FLAGS
)
_SET = cli.define_set(FLAGS, "N=4")
_SHOW = flags.DEFINE_integer(
  "show",
  0,
  "Print so many problems' samples, their steps coloured by their scores.",
  flag_values=FLAGS,
  lower_bound=0,
)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Searches what is missing; returns the result."""
  del argv
  cli.required(config=_CONFIG.value, workdir=_WORKDIR.value)
  cli.local(workdir=_WORKDIR.value)
  from experiments.core import config, runtime
  from experiments.searching import display, running, search_run
  from research.training import preemption

  runtime.setup()
  read = config.read(_CONFIG.value, _SET.value, root=search_run.SearchRun)
  folder = pathlib.Path(_WORKDIR.value)
  with preemption.handling_signals():
    pool = running.complete(read.experiment, folder, read.text)
    for searched in pool[: _SHOW.value]:
      cli.say(display.for_terminal(searched, sys.stdout.isatty()) + "\n")
    return running.report(read.experiment, pool, folder)


if __name__ == "__main__":
  cli.run(main)
