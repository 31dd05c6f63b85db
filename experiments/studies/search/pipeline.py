"""A study whose arms are commands: train, label and search, from run files.

Each arm is a run file as users run it, with bindings that may name the working
directories of arms before it: a policy, labels of its steps, a reward model of
them, and searches with both.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from experiments.core import cli, config
from experiments.labelling import label_run
from experiments.searching import (
  results,
  running,
  search_run,
  wrong_answers,
)
from experiments.searching.pool import Searched
from experiments.stages import running as training
from experiments.studies import protocol
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from experiments.studies.search import pictures, rounds, systems
from experiments.studies.search.reports import Report
from experiments.studies.search.systems import Comparison, System
from research.prm import formats
from research.search.choose import BestOf
from research.typing import UserError

Command = Literal["train", "label", "search"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """A command with a run file.

  Attributes:
    name: of the step, a word.
    command: which reads the file.
    path: of the file, below `configs/`.
    set: bindings. `{seed}` is the seed, `{NAME}` what the step of that name
      has left with the same seed, or with its last one: the working directory,
      or of labels the file.
    seeds: number of seeds; None for the study's.
    pool: name of a search whose samples are chosen from again; None for a
      search of its own.
  """

  name: str
  command: Command
  path: str
  set: tuple[str, ...] = ()
  seeds: int | None = None
  pool: str | None = None

  def __post_init__(self):
    if not self.name.isidentifier():
      raise UserError(f"Step.name: found {self.name!r}, expected one word")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline(protocol.Study):
  """Commands, what they cost, and comparisons of what they reach.

  Attributes:
    steps: the commands; what one needs stands before it.
    shown: the systems of the table.
    comparisons: claims, each of two systems.
    curves: systems of the picture by samples, one curve a budget.
    reports: more tables.
    seeds: of training and sampling; the problems are the same for all.
  """

  steps: tuple[Step, ...]
  shown: tuple[System, ...] = ()
  comparisons: tuple[Comparison, ...] = ()
  curves: tuple[System, ...] = ()
  reports: tuple[Report, ...] = ()
  seeds: int = 3

  def __post_init__(self):
    names = [step.name for step in self.steps]
    protocol.distinct(names, "Pipeline.steps")
    every = [*self.shown, *self.curves]
    every += [x for c in self.comparisons for x in (c.first, c.second)]
    every += [x for report in self.reports for x in report.systems]
    for system in every:
      if system.step not in names:
        raise UserError(
          f"Pipeline: found a system of the step {system.step!r}, expected one"
          f" of {', '.join(names)}"
        )

  @property
  def arms(self) -> list[str]:
    """One for each seed and step, a seed after the other."""
    return [
      _arm(step, seed)
      for seed in range(self.seeds)
      for step in self.steps
      if seed < self._seeds_of(step)
    ]

  def _seeds_of(self, step: Step) -> int:
    return self.seeds if step.seeds is None else min(step.seeds, self.seeds)

  def _step(self, arm: str) -> tuple[Step, int]:
    name, seed = arm.rsplit(", seed ", 1)
    (found,) = (x for x in self.steps if x.name == name)
    return found, int(seed)

  def settings(self, arm: str) -> str:
    """Returns the arm's configuration, and those of the arms that it needs."""
    step, seed = self._step(arm)
    text = _text(step, tuple(x.name for x in self.steps), seed)
    given = [self.settings(x) for x in self._given(step, seed)]
    return "\n".join([*given, text])

  def needs(self, arm: str) -> list[str]:
    """Returns the arms of the commands whose directories an arm reads."""
    step, seed = self._step(arm)
    pool = [x for x in self.steps if x.name == step.pool]
    return [*self._given(step, seed), *(_arm(x, seed) for x in pool)]

  def _given(self, step: Step, seed: int) -> list[str]:
    """Returns the arms whose directories a step's bindings name."""
    return [
      _arm(x, min(seed, self._seeds_of(x) - 1))
      for x in self.steps
      if any(f"{{{x.name}}}" in line for line in step.set)
    ]

  def run(self, arm: str, before: Rows, shared: pathlib.Path) -> Row:
    """Returns what the command's result says."""
    del before
    step, seed = self._step(arm)
    places = {
      x.name: str(_place(x, min(seed, self._seeds_of(x) - 1), shared))
      for x in self.steps
    }
    read = _read(step, places, seed)
    folder = pathlib.Path(places[step.pool or step.name])
    folder.parent.mkdir(parents=True, exist_ok=True)
    if step.command == "train":
      workdir = training.claim(read.experiment, read.text, folder)
      result = training.train(read.experiment, workdir)
      return _trained(result) | rounds.curves_of(folder)
    if step.command == "label":
      return _labelled(read.experiment.run(cli.say), folder)
    pool = running.complete(read.experiment, folder, read.text)
    row = _searched(read.experiment, pool)
    if step.pool is None:  # what is chosen again has those of its pool
      strategy = read.experiment.strategy
      row["estimates"] = results.estimates_of(pool, strategy)
    return row

  def summary(self, row: Row) -> str:
    """Returns the accuracy, if there is one."""
    if "accuracy" in row:
      return f"{100 * row['accuracy']:.1f}% right"
    return ", ".join(
      f"{name} {x:.3g}" for name, x in row.items() if isinstance(x, float)
    )

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each system that is shown."""
    return [
      systems.line(system, found)
      for system in self.shown
      if (found := self.rows_of(system, rows))
    ]

  def tables(self, rows: Rows) -> list[Lines]:
    """Returns the table, if systems are shown, and those of the reports."""
    own = [self.table(rows)] if self.shown else []
    more = [x.lines(lambda s: self.rows_of(s, rows)) for x in self.reports]
    return [*own, *more]

  def rows_of(self, system: System, rows: Rows) -> list[Row]:
    """Returns a system's rows, a seed after the other."""
    (step,) = (x for x in self.steps if x.name == system.step)
    arms = [_arm(step, seed) for seed in range(self._seeds_of(step))]
    return [rows[arm] for arm in arms if arm in rows]

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what the comparisons say."""
    return [
      systems.verdict(
        x, self.rows_of(x.first, rows), self.rows_of(x.second, rows)
      )
      for x in self.comparisons
    ]

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves a picture of accuracies against FLOPs."""
    if self.shown or self.curves:
      points = {x: self.rows_of(x, rows) for x in self.shown}
      curves = {x: self.rows_of(x, rows) for x in self.curves}
      pictures.against_flops(points, curves, folder / f"{title}.png", title)
    for i, report in enumerate(self.reports):
      path = folder / f"{title}_{i + 1}.png"
      report.plot(lambda system: self.rows_of(system, rows), path)


def _arm(step: Step, seed: int) -> str:
  return f"{step.name}, seed {seed}"


def _place(step: Step, seed: int, shared: pathlib.Path) -> pathlib.Path:
  """Returns a step's working directory, or the file of its labels."""
  suffix = ".jsonl" if step.command == "label" else ""
  return shared / "runs" / f"{step.name}_{seed}{suffix}"


@functools.cache
def _text(step: Step, names: tuple[str, ...], seed: int) -> str:
  """Returns a step's configuration, with names in place of paths."""
  return _read(step, {name: name for name in names}, seed).text


def _read(step: Step, places: Mapping[str, str], seed: int) -> config.Read:
  roots = {"label": label_run.LabelRun, "search": search_run.SearchRun}
  bindings = []
  for line in step.set:
    # Not str.format: a value may have braces of its own.
    for name, place in {**places, "seed": str(seed)}.items():
      line = line.replace(f"{{{name}}}", place)
    bindings.append(line)
  if step.command == "train":
    return config.read(step.path, bindings)
  return config.read(step.path, bindings, root=roots[step.command])


def _trained(result: Mapping[str, Any]) -> Row:
  """Returns the numbers of a training's result, and its answers."""
  return {
    name: x
    for name, x in result.items()
    if name == "answers"
    or (isinstance(x, int | float) and not isinstance(x, bool))
  }


def _labelled(found: label_run.Labelled, path: pathlib.Path) -> Row:
  formats.write(str(path), found.solutions, formats.FORMATS["native"])
  correct = [bool(one.final_correct) for one in found.solutions]
  return {
    "solutions": len(found.solutions),
    "cut": found.cut,
    "correct": float(np.mean(correct)),
  }


def _searched(run: search_run.SearchRun, pool: Sequence[Searched]) -> Row:
  """Returns a pool's accuracy and cost, and what each problem reached."""
  whole = results.result_of(pool, run.strategy, run.choice, run.n)
  each = results.accuracies(pool, run.choice, run.n)
  if isinstance(run.choice, BestOf):
    whole["wrong"] = wrong_answers.kinds_of(pool, run.choice.aggregate)
  return whole | {
    "each": [round(x, 6) for x in each],
    "right": [sum(x.correct for x in one.samples) for one in pool],
    "samples": [len(one.samples) for one in pool],
    "prompt_flops_policy": float(
      np.mean([one.prompt_ledger.flops_policy for one in pool])
    ),
  }
