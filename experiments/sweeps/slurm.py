"""Units as an array of Slurm jobs: the script, and who of them is in the queue.

`script` renders what `sbatch` takes; nothing of ours stays running. `srun`
starts the processes of a unit, which find each other by Slurm's variables, as
`jax.distributed.initialize()` reads them.

Slurm asks the processes of a job to stop by SIGTERM: before its time is over,
when another job preempts it, and by `scontrol requeue` and `scancel`. A run
then saves and exits with 42. The script asks for the unit to be queued again if
it still counts as running (`requeue incomplete`): so it goes on after its time
is over, is not queued twice where Slurm has done so, and stays cancelled.
"""

import json
import pathlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.sweeps.work import PREEMPTED, TERMINATED, Work
from research.training.preemption import GRACE_VARIABLE
from research.typing import UserError

FOLDER = "slurm"
"""In the sweep's working directory: the script, its jobs, what srun says."""

JOBS = "jobs.jsonl"

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --output={output}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
{options}
# A unit each; `python -m experiments.sweep` wrote this.
units=(
{units}
)
unit=${{units[SLURM_ARRAY_TASK_ID]}}

# Seconds between SIGTERM and SIGKILL: a run says if a save takes longer.
{variable}=$(scontrol show config | awk '$1 == "KillWait" {{print $3}}')
export {variable}

# SIGTERM is for the run, which saves: this shell, and srun, wait for it.
trap '' TERM

for attempt in 1 2; do
  srun --kill-on-bad-exit=0 --wait=300 {command} \\
    >> {log} 2>&1
  status=$?
  case $status in
    0) exit 0 ;;
    {preempted} | {terminated})  # saved on request, or had nothing to save yet
      scontrol requeue incomplete "$SLURM_JOB_ID"
      exit $status ;;
  esac
  echo "$unit: attempt $attempt of 2 ended with $status"
done
exit $status
"""


class Job(NamedTuple):
  """A unit in the queue.

  Attributes:
    array: number of the array that it is a job of.
    state: in Slurm's words, such as RUNNING.
    nodes: where it runs; empty if it does not.
  """

  array: str
  state: str
  nodes: str


def script(
  units: Sequence[Work],
  *,
  name: str,
  folder: pathlib.Path,
  options: Sequence[str] = (),
) -> str:
  """Returns the text that `sbatch` takes.

  Args:
    units: of one sweep: they differ in their names.
    options: of `sbatch`, which win: `--nodes=2`, `--time=8:00:00`.

  Raises:
    UserError: an option is none, or is what this text depends on.
  """
  for option in options:
    flag = option.split("=")[0]
    if not option.startswith("-") or "\n" in option:
      raise UserError(
        f"--sbatch={option}: found no option, expected one of sbatch's, e.g."
        " --sbatch=--time=8:00:00."
      )
    if flag in ("-a", "--array", "--no-requeue", "--wrap"):
      raise UserError(
        f"--sbatch={option}: the sweep sets --array and --requeue itself; leave"
        " it out."
      )
  first = units[0]
  # The shell puts in each unit's name where the first one has its own.
  here = shlex.quote(str(first.config.parent))
  paths = {
    "config": f'{here}/"$unit".gin',
    "workdir": f'{here}/"$unit"',
    "result": f'{here}/"$unit".json',
  }
  words = []
  for word in [sys.executable, *first.arguments]:
    flag = word.removeprefix("--").partition("=")[0]
    own = word.startswith("--") and flag in paths and word not in first.options
    words.append(f"--{flag}={paths[flag]}" if own else shlex.quote(word))
  return _SCRIPT.format(
    name=shlex.quote(name),
    last=len(units) - 1,
    output=shlex.quote(f"{str(folder).replace('%', '%%')}/%A_%a.log"),
    options="".join(f"#SBATCH {shlex.quote(x)}\n" for x in options),
    units="\n".join(f"  {shlex.quote(unit.name)}" for unit in units),
    command=" \\\n    ".join([" ".join(words[:3]), *words[3:]]),
    log=f'{here}/"$unit".log',
    preempted=PREEMPTED,
    terminated=TERMINATED,
    variable=GRACE_VARIABLE,
  )


def submit(
  units: Sequence[Work],
  workdir: pathlib.Path,
  name: str,
  options: Sequence[str] = (),
) -> str:
  """Queues units as one array; returns its number.

  Raises:
    UserError: Slurm is not here, or refuses.
  """
  folder = workdir / FOLDER
  text = script(units, name=name, folder=folder, options=options)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / "sweep.sh"
  path.write_text(text, encoding="utf-8")
  # --parsable prints "number" or "number;cluster".
  array = _slurm("sbatch", "--parsable", str(path)).strip().split(";")[0]
  try:
    _record(workdir, {"array": array, "units": [unit.name for unit in units]})
  except OSError as error:
    raise UserError(
      f"{folder / JOBS}: cannot be written ({error.strerror}), but Slurm has"
      f" queued array {array}, which the next command would not know.\nRun"
      f" 'scancel {array}', and mend that first."
    ) from error
  return array


def queued(workdir: pathlib.Path) -> dict[str, Job]:
  """Returns the units of a sweep that Slurm has queued or runs, by name."""
  arrays = {r["array"]: r["units"] for r in _records(workdir) if "array" in r}
  if not arrays:
    return {}
  # Of all the user's jobs: squeue fails if asked for what it has forgotten.
  form = "--format=%F|%K|%T|%N"
  found = {}
  for line in _slurm("squeue", "--me", "--array", "--noheader", form).split():
    array, index, state, nodes = line.split("|")
    if array in arrays and index.isdigit():
      found[arrays[array][int(index)]] = Job(array, state, nodes)
  return found


def ended(workdir: pathlib.Path, queued: Mapping[str, Job]) -> set[str]:
  """Returns the units that were submitted, not cancelled, and have left Slurm.

  Without a result they have failed.
  """
  names: set[str] = set()
  for record in _records(workdir):
    names |= set(record.get("units", ()))
    names -= set(record.get("cancelled", ()))
  return names - set(queued)


def cancel(workdir: pathlib.Path) -> list[str]:
  """Cancels units that are queued or run, and save; returns their names."""
  jobs = queued(workdir)
  if jobs:
    _slurm("scancel", *sorted({job.array for job in jobs.values()}))
    _record(workdir, {"cancelled": list(jobs)})
  return list(jobs)


def _record(workdir: pathlib.Path, record: Mapping[str, Any]) -> None:
  with (workdir / FOLDER / JOBS).open("a", encoding="utf-8") as file:
    file.write(json.dumps(record) + "\n")


def _records(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns what was submitted and cancelled, in order."""
  path = workdir / FOLDER / JOBS
  try:
    lines = path.read_text("utf-8").splitlines()
  except FileNotFoundError:
    return []
  try:
    return [dict(json.loads(line)) for line in lines]
  except (ValueError, TypeError) as error:
    raise UserError(
      f"{path}: is no list of Slurm's jobs ({error}).\nExpected what this"
      " command wrote; delete it if none of them is queued any more."
    ) from error


def table(
  jobs: Mapping[str, Job], progress: Mapping[str, str]
) -> list[dict[str, Any]]:
  """Returns a row for each unit that is queued or runs."""
  return [
    {
      "unit": name,
      "state": job.state,
      "on": job.nodes,
      "at": progress.get(name),
    }
    for name, job in jobs.items()
  ]


def _slurm(command: str, *arguments: str) -> str:
  """Returns what a command of Slurm's prints."""
  if shutil.which(command) is None:
    raise UserError(
      f"--launcher=slurm: found no {command} here, expected Slurm's commands;"
      " run this where jobs are submitted."
    )
  done = subprocess.run(
    [command, *arguments], capture_output=True, text=True, check=False
  )
  if done.returncode:
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    raise UserError(f"{command}: {' '.join(said[:2]) or done.returncode}")
  return done.stdout
