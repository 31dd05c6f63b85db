"""A search in a working directory: what it stores, resumes and reports."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tqdm

from experiments.core import cli
from experiments.searching import display, results, sampling, trained
from experiments.searching import pool as pools
from experiments.searching.pool import Sample, Searched
from experiments.searching.search_run import SearchRun
from research import progress
from research.io import folders
from research.reasoning import sample_logs
from research.reasoning.problem import Problem, Verdict
from research.reasoning.tasks.task import Task
from research.training.checkpoints import run_lock
from research.typing import UserError

SETTINGS = "settings.json"
"""In a working directory: what decided on the samples of its pool."""

STEPS = "trained_steps"
"""In `SETTINGS`: how far each run was trained whose model samples or judges."""

LOGS = "samples.jsonl"
"""In a working directory: the samples in lm-evaluation-harness' layout."""

TRACES = "traces.html"
"""In a working directory: the first problems, to look at."""


def complete(run: SearchRun, folder: pathlib.Path, text: str) -> list[Searched]:
  """Searches the problems that a folder's pool lacks; returns all of the run.

  Raises:
    UserError: the pool is of other settings, another process adds to it, or
      what searches raise.
  """
  with run_lock.locked(folder):
    return _complete(run, folder, text)


def _complete(
  run: SearchRun, folder: pathlib.Path, text: str
) -> list[Searched]:
  _claim(run, folder, text)
  path = folder / pools.FILE
  pools.repair(path)
  searched_by_id = {x.problem.id: x for x in pools.read(path)}
  if not searched_by_id:  # a complete pool does not need the models' runs
    trained.check_workdirs(run)
  problems = sampling.problems_of(run)
  sampled = {name: x.problem for name, x in searched_by_id.items()}
  _check_problems(folder, problems, sampled)
  ids = [problem.id for problem in problems]
  done = sum(x in searched_by_id for x in ids)
  if done < len(ids):
    batches = sampling.batches(run, searched_by_id)  # opens the models
    size = dict(total=len(ids), initial=done, dynamic_ncols=True)
    with progress.phase(None), tqdm.tqdm(**size, unit="problem") as bar:
      for searched in batches:
        pools.append(path, searched)
        searched_by_id |= {x.problem.id: x for x in searched}
        bar.update(len(searched))
  return [searched_by_id[x] for x in ids]


def _check_problems(
  folder: pathlib.Path,
  problems: Sequence[Problem],
  sampled: Mapping[str, Problem],
) -> None:
  """Raises UserError if a problem in the pool is no longer the task's."""
  for problem in problems:
    if problem.id not in sampled:
      continue
    now = json.loads(json.dumps(problem.to_json()))
    before = json.loads(json.dumps(sampled[problem.id].to_json()))
    for field in now:
      if now[field] != before[field]:
        raise UserError(
          f"{folder}: has samples of another problem {problem.id}: {field} was"
          f" {before[field]!r:.160},\nfound {now[field]!r:.160}. The task's"
          " data has changed: use another --workdir."
        )


def _claim(run: SearchRun, folder: pathlib.Path, text: str) -> None:
  """Makes the folder, and leaves the configuration in it.

  Raises:
    UserError: it has samples of another search, or files of another command.
  """
  folder.mkdir(parents=True, exist_ok=True)
  # As it is read back: tuples are lists there.
  now = json.loads(json.dumps(run.settings()))
  steps = trained.saved_steps(run)
  note, pool = folder / SETTINGS, folder / pools.FILE
  sampled = pool.exists() and pool.stat().st_size > 0
  if note.exists() and sampled:
    before = _settings(note)
    _check_trained(folder, before.pop(STEPS, {}), steps)
    # A field may be left out, such as the sampler of those that have none.
    differing = [k for k in {**now, **before} if before.get(k) != now.get(k)]
    if differing:
      name = differing[0]
      raise UserError(
        f"{folder}: has samples of another search: {name} was"
        f" {json.dumps(before.get(name))[:160]},\nfound"
        f" {json.dumps(now.get(name))[:160]}. Use another --workdir."
      )
  elif not note.exists() and (sampled or (folder / "config.gin").exists()):
    raise UserError(
      f"{folder}: found files of another command, and no {SETTINGS}, expected a"
      " new folder or one of a search.\nUse another --workdir."
    )
  note_now = json.dumps(now | {STEPS: steps}, indent=1)
  folders.write_text(note, note_now + "\n")
  folders.write_text(folder / "config.gin", text)


def _check_trained(
  folder: pathlib.Path, before: Any, now: Mapping[str, int]
) -> None:
  """Raises UserError if a model has been trained since the pool was started.

  A pool does not need its models' runs once it is complete: one that is no
  longer there is not missed.
  """
  for workdir, step in now.items():
    was = before.get(workdir, step) if isinstance(before, dict) else step
    if was != step:
      raise UserError(
        f"{folder}: has samples of {workdir} at step {was}, found step {step}."
        " Use another --workdir."
      )


def _settings(note: pathlib.Path) -> dict[str, Any]:
  try:
    settings = json.loads(note.read_text("utf-8"))
  except (ValueError, RecursionError) as error:
    raise UserError(f"{note}: is not JSON: {error}") from error
  if not isinstance(settings, dict):
    raise UserError(f"{note}: expected a JSON object with a search's settings")
  return settings


def report(
  run: SearchRun, pool: list[Searched], folder: pathlib.Path
) -> dict[str, Any]:
  """Writes the files of a result; returns what to print as JSON."""
  result = {
    "task": _task_name(run.task),
    "strategy": type(run.strategy).__name__,
    **results.result_of(pool, run.strategy, run.choice, run.n),
  }
  if result["answered"] < 0.5:
    cli.warn(
      f"an answer was found in {result['answered']:.0%} of the samples;"
      f" see {folder / TRACES} for their texts. The task's `extract` says where"
      " an answer stands."
    )
  details = {
    "choice": repr(run.choice),
    "split": run.task.split,
    "estimates": results.estimates_of(pool, run.strategy),
  }
  cli.write_json(folder / "result.json", result | details)
  title = f"{result['task']}: {result['strategy']}"
  folders.write_text(folder / TRACES, display.page(pool, title))
  _write_logs(run, pool, folder)
  return result


def _task_name(task: Task) -> str:
  """Returns the task's name, with its data set's where there are several."""
  name = getattr(task, "name", None)
  return f"{task.NAME}/{name}" if isinstance(name, str) else task.NAME


def _write_logs(
  run: SearchRun, pool: list[Searched], folder: pathlib.Path
) -> None:
  """Writes the samples as lm-evaluation-harness logs them."""
  logs = [
    sample_logs.sample_of(
      i,
      searched.problem,
      [x.trace.text for x in searched.samples],
      [_counted(x) for x in searched.samples],
      {"temperature": run.sampling.temperature or 0.0},
    )
    for i, searched in enumerate(pool, run.problems[0])
  ]
  sample_logs.write_samples(str(folder / LOGS), logs)


def _counted(sample: Sample) -> Verdict:
  """Returns a sample's verdict; one that was cut has no answer."""
  if sample.answer is None:
    return Verdict(correct=False, reason="no answer")
  return sample.verdict
