r"""Runs a sweep: one command many times over, with other bindings.

  python -m experiments.sweep --sweep=sweeps/quickstart_rank.gin --workdir=DIR

A sweep file names a command, by default train, and lists bindings to vary
(`experiments.sweeps.sweeps` has the notation). The configuration of every unit
is built before any unit runs. The working directory gets units/ (for each unit
its configuration, log, result, and working directory), results.csv, results.png
and result.json, whose content is the last line on stdout. The same command
again runs the missing units. A unit that fails is run once more after the
others; if it fails again, the end of its log is printed, and the command exits
with 1. On SIGTERM or Ctrl-C it lets running units save, and exits with 42.

Slurm runs the units as an array of jobs, which this submits; `--status`
collects results, `--cancel` ends what is queued or runs:

  python -m experiments.sweep --sweep=... --workdir=DIR --launcher=slurm \
      --sbatch=--nodes=2 --sbatch=--time=8:00:00

For Kubernetes this writes jobset.yaml, which `kubectl apply -f` takes:

  python -m experiments.sweep --sweep=... --workdir=/mnt/DIR --launcher=jobset \
      --topology=v5e:4x4 --slices=2 --image=IMAGE --volume=CLAIM:/mnt
"""

if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

import collections
import contextlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.core import cli
from experiments.core.definers import definers
from research.errors import UserError

FLAGS = cli.new_flags()
define = definers(FLAGS)

_SWEEP = define.text(
  "sweep",
  "Gin file: a path, or one under configs/, e.g. sweeps/quickstart_rank.gin.",
)
_LAUNCHER = define.choice(
  "launcher",
  "Where units run: on this machine, on Slurm as a job array, or on Kubernetes "
  "as JobSets.",
  default="local",
  enum_values=["local", "slurm", "jobset"],
)
_SBATCH = define.texts(
  "sbatch",
  "Option of sbatch, for Slurm's jobs, e.g. --sbatch=--gpus-per-node=8.",
)
_TOPOLOGY = define.text(
  "topology",
  "What each JobSet runs on: a slice of TPUs, e.g. v5e:4x4, v5p:2x2x4 or "
  "v6e:16x16, or a node of GPUs, e.g. h100:8.",
)
_SLICES = define.integer(
  "slices",
  "Slices of TPUs, or nodes of GPUs, of each JobSet.",
  default=1,
  lower_bound=1,
)
_IMAGE = define.text(
  "image", "Image of a JobSet's containers, in which `python` has Heptad."
)
_VOLUME = define.texts(
  "volume",
  "CLAIM:/path: a PersistentVolumeClaim that pods mount. One has the working "
  "directory, under the same path as here.",
)
_STATUS = define.switch(
  "status",
  "Start nothing; print which units are queued, running, done and failed, and "
  "collect the results.",
)
_CANCEL = define.switch(
  "cancel",
  "Start nothing; cancel the units that Slurm has queued or runs. Runs save.",
)
_WORKDIR = define.text(
  "workdir",
  "The sweep's working directory; by default runs/ and the sweep's name.",
)
_SET = define.texts(
  "set", "Gin binding for every unit, e.g. --set=STEPS=4 for a trial."
)
_PARALLEL = define.integer(
  "parallel", "Units that run at the same time.", default=1, lower_bound=1
)


_OF_LAUNCHERS = {
  "local": ("parallel",),
  "slurm": ("sbatch",),
  "jobset": ("topology", "slices", "image", "volume"),
}


def main(argv: Sequence[str]) -> dict[str, Any] | None:
  """Runs the units; returns the result, which the command prints as JSON."""
  del argv
  cli.required(sweep=_SWEEP.value)
  cli.local(workdir=_WORKDIR.value)
  cli.directory(workdir=_WORKDIR.value)
  if _CANCEL.value:
    _check_cancel()
  elif not _STATUS.value:
    _check_launcher()
  name = pathlib.Path(_SWEEP.value).stem
  workdir = pathlib.Path(_WORKDIR.value or f"runs/{name}").absolute()
  cli.run_file(_SWEEP.value, flag="sweep", root="sweeps.Sweep")
  if _STATUS.value and not (workdir / "units").is_dir():
    raise UserError(
      f"--workdir={workdir}: found no sweep there, expected the directory of"
      " one that was started"
    )
  from experiments import sweeps
  from experiments.core import config
  from experiments.sweeps import slurm, sweep_units, work

  sweep = config.read(_SWEEP.value, root=sweeps.Sweep, flag="sweep").experiment
  # What this command does not check, its units do not check either.
  checks = [] if FLAGS["typecheck"].value else ["--notypecheck"]
  units = sweep_units.plan(sweep, workdir, _SET.value, checks)
  if _CANCEL.value:
    return {"cancelled": slurm.cancel(workdir)}
  if _STATUS.value:
    return _status(sweep, units, workdir, name)
  with work.lock(workdir) as lock:
    # --- what is left to do ---
    queued = slurm.queued(workdir)
    left = [unit for unit in units if unit.result() is None]
    todo = [unit for unit in left if unit.work.name not in queued]
    kept = [unit for unit in left if unit.work.name in queued]
    if other := [unit for unit in kept if not unit.is_written()]:
      raise _other_settings(other)
    sweep_units.check_steps(todo)
    sweep_units.write(todo)
    if _LAUNCHER.value == "slurm":
      return _submit(units, todo, workdir, name)
    if _LAUNCHER.value == "jobset":
      return _write_jobsets(units, todo, workdir, name)
    if len(todo) < len(left):
      raise _busy(queued)
    cli.say(
      f"{len(units)} units, {len(todo)} of them to run, in {workdir}; they log"
      " to units/*.log"
    )
    return _run(sweep, units, todo, lock, workdir, name)


def _check_launcher() -> None:
  """Raises UserError for flags of another launcher than the chosen one."""
  for launcher, names in _OF_LAUNCHERS.items():
    if launcher != _LAUNCHER.value:
      cli.exclusive(f"with --launcher={_LAUNCHER.value}", FLAGS, *names)


def _check_cancel() -> None:
  """Raises UserError for what --cancel cannot do."""
  cli.exclusive("with --cancel", FLAGS, "status")
  if _LAUNCHER.value == "jobset":
    raise UserError(
      "--cancel: cancels jobs of Slurm, not JobSets.\nDelete those with"
      " 'kubectl delete -f' of the sweep's jobset.yaml."
    )


def _run(
  sweep: Any,
  units: Sequence[Any],
  todo: Sequence[Any],
  lock: int,
  workdir: pathlib.Path,
  name: str,
) -> dict[str, Any]:
  """Runs units on this machine; returns the sweep's result."""
  from experiments.sweeps import launch, sweep_results
  from research import progress as phases

  progress = sweep_results.Progress(sweep, units, len(todo), workdir)
  with contextlib.closing(progress), phases.phase(None):  # units have lines
    statuses = launch.local(
      [unit.work for unit in todo],
      parallel=_PARALLEL.value,
      events=progress,
      lock=lock,
    )
  result = sweep_results.report(sweep, units, statuses, workdir, name)
  sweep_results.check_complete(result, units)
  return result


def _submit(
  units: Sequence[Any],
  todo: Sequence[Any],
  workdir: pathlib.Path,
  name: str,
) -> dict[str, Any]:
  """Queues units; returns how many, and the number of their array."""
  from experiments.sweeps import slurm

  array = None
  if todo:
    array = slurm.submit(
      [unit.work for unit in todo], workdir, name, _SBATCH.value
    )
    cli.say(f"{workdir / slurm.FOLDER}: submitted as {array}; see --status")
  return {
    "units": len(units),
    "submitted": len(todo),
    "array": array,
    "workdir": str(workdir),
  }


def _write_jobsets(
  units: Sequence[Any],
  todo: Sequence[Any],
  workdir: pathlib.Path,
  name: str,
) -> dict[str, Any]:
  """Writes jobset.yaml; returns how many units it has, and where it is."""
  from experiments.sweeps import jobset
  from research.io import folders

  cli.required(topology=_TOPOLOGY.value, image=_IMAGE.value)
  path = workdir / "jobset.yaml"
  text = jobset.manifest(
    todo,
    sweep=name,
    image=_IMAGE.value,
    on=jobset.hardware(_TOPOLOGY.value, _SLICES.value),
    volumes=_VOLUME.value,
  )
  with folders.writing(path):
    folders.write_text(path, text)
  cli.say(f"kubectl apply -f {path} starts them; delete -f ends them, saved")
  return {"units": len(units), "written": len(todo), "jobset": str(path)}


def _status(
  sweep: Any,
  units: Sequence[Any],
  workdir: pathlib.Path,
  name: str,
) -> dict[str, Any]:
  """Prints how far the units are; returns the result of those that ended."""
  from experiments.core import tables
  from experiments.sweeps import slurm, sweep_results

  queued = slurm.queued(workdir)
  rows = slurm.table(
    queued, {u.work.name: sweep_results.progress_of(u.work) for u in units}
  )
  if rows:
    cli.say(tables.text(rows))
  statuses = dict.fromkeys(slurm.ended(workdir, queued), 1)
  result = sweep_results.report(sweep, units, statuses, workdir, name)
  for unit in [u for u in units if u.work.name in result["failed"]]:
    cli.say(sweep_results.end_of(unit.work.log))
  states = collections.Counter(job.state.lower() for job in queued.values())
  return {**result, "queued": dict(states)}


def _other_settings(units: Sequence[Any]) -> Exception:
  return UserError(
    f"Slurm has queued or runs {len(units)} units of this sweep with other"
    f" settings: {', '.join(unit.work.name for unit in units[:3])}"
    f"{', ...' if len(units) > 3 else ''}.\nExpected the settings that they"
    " were submitted with; --cancel ends them, the same command then submits"
    " them anew."
  )


def _busy(queued: Mapping[str, Any]) -> Exception:
  return UserError(
    f"Slurm has queued or runs {len(queued)} units of this sweep.\nExpected"
    " none, to run units here; --status shows them, --cancel ends them."
  )


if __name__ == "__main__":
  cli.run(main)
