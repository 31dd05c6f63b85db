"""Runs a sweep: one run many times over, with other bindings.

  python -m experiments.sweep --sweep=sweeps/quickstart_rank.gin --workdir=DIR

A sweep file lists bindings to vary (`experiments.sweeps` has the notation). The
configuration of every unit is built before any unit runs. The working directory
gets units/ (a run each, with its configuration and its log), results.csv,
results.png and result.json, whose content is the last line on stdout. The same
command again runs the missing units. A unit that fails does not stop the
others; the command then exits with 1. On SIGTERM or Ctrl-C it lets running
units save, and exits with 42.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.core import cli

FLAGS = cli.new_flags()

_SWEEP = flags.DEFINE_string(
  "sweep",
  None,
  "Gin file, as it stands or under configs/, e.g. sweeps/quickstart_rank.gin.",
  flag_values=FLAGS,
)
_LAUNCHER = flags.DEFINE_enum(
  "launcher",
  "local",
  ["local"],
  "Where the units run: local is on this machine.",
  flag_values=FLAGS,
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "The sweep's working directory; by default runs/ and the sweep's name.",
  flag_values=FLAGS,
)
_SET = flags.DEFINE_multi_string(
  "set",
  [],
  "Gin binding for every unit, e.g. --set=STEPS=4 for a trial.",
  flag_values=FLAGS,
)
_PARALLEL = flags.DEFINE_integer(
  "parallel",
  1,
  "Units that run at the same time.",
  lower_bound=1,
  flag_values=FLAGS,
)


def main(argv: Sequence[str]) -> dict[str, Any] | None:
  """Runs the units; returns the result, which the command prints as JSON."""
  del argv
  cli.required(sweep=_SWEEP.value)
  cli.local(workdir=_WORKDIR.value)
  from experiments import sweeps
  from experiments.core import config
  from experiments.sweeps import launch, sweep_results, sweep_units
  from research import progress as phases

  sweep = config.read(_SWEEP.value, root=sweeps.Sweep, flag="sweep").experiment
  name = pathlib.Path(_SWEEP.value).stem
  workdir = pathlib.Path(_WORKDIR.value or f"runs/{name}").absolute()
  # What this command does not check, its units do not check either.
  checks = [] if FLAGS["typecheck"].value else ["--notypecheck"]
  units = sweep_units.plan(sweep, workdir, _SET.value, checks)
  todo = [unit for unit in units if unit.result() is None]
  cli.say(
    f"{len(units)} units, {len(todo)} of them to run, in {workdir}; they log to"
    " units/*.log"
  )

  # --- run ---
  sweep_units.write(todo)
  progress = sweep_results.Progress(sweep, units, len(todo), workdir)
  launcher = functools.partial(
    launch.local, parallel=_PARALLEL.value, on_end=progress.ended
  )
  with phases.phase(None):  # each unit that ends has its line
    statuses = launcher([unit.work for unit in todo])

  # --- results ---
  result = sweep_results.report(sweep, units, statuses, workdir, name)
  sweep_results.check_complete(result, units)
  return result


if __name__ == "__main__":
  cli.run(main)
