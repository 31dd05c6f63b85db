"""A study whose arms are commands, each with a run file or flags as users pass.

Bindings and flags may name what arms before it have left: a policy, labels of
its steps, a reward model of them, and searches with both; or a trained model,
its quantized copy, and the perplexity of either. A row is what the command's
result says; a claim compares a number of two rows.
"""

import dataclasses
import functools
import importlib
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.core import cli, config, stats
from experiments.core.experiment import Experiment
from experiments.labelling import label_run
from experiments.quantizing import quantizing
from experiments.searching import (
  results,
  running,
  search_run,
  wrong_answers,
)
from experiments.searching.pool import Searched
from experiments.stages import running as training
from experiments.studies import claims, pictures, protocol
from experiments.studies.claims import Claim
from experiments.studies.listed import set_parts, with_systems
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from experiments.studies.search import pictures as search_pictures
from experiments.studies.search import rounds, systems
from experiments.studies.search.reports import Report
from experiments.studies.search.systems import Comparison, System
from research.prm import formats
from research.ranges import OneOf, Ranged
from research.search.choose import BestOf
from research.typing import UserError

CONFIGURED = "train", "label", "search"
"""Commands whose arms are a run file and bindings."""

ROOTS = {
  "train": Experiment,
  "label": label_run.LabelRun,
  "search": search_run.SearchRun,
  "quantize": quantizing.Job,
}
"""What the run file of a command builds; an experiment where none is named."""

FLAGGED = (
  *("adapters", "convert", "evaluate", "generate", "perplexity", "plan"),
  "quantize",
)
"""Commands whose arms are flags."""

UNITS = {"%": 100, " GB": 1e-9, " MB": 1e-6}
"""What numbers are multiplied by where a column's title ends so."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Ranged):
  """A command with a run file, or with flags.

  Attributes:
    name: of the step, a word.
    command: which one, of `CONFIGURED` or `FLAGGED`.
    path: of the run file, below `configs/`.
    set: bindings, or the flags of a command that has them. `{seed}` is the
      seed, `{NAME}` what the step of that name has left with the same seed, or
      with its last one: the working directory, of labels the file. A step's
      own name is where a command with flags leaves its result.
    seeds: number of seeds; None for the study's.
    pool: name of a search whose samples are chosen from again; None for a
      search of its own.
    title: in tables; "" for the name.
    tries: a macro and values, e.g. `("LEARNING_RATE", (1e-3, 3e-3))`; the
      training is run with each, and the one with the least `least` stands.
    least: the metric that chooses among them.
  """

  name: str
  command: OneOf(*CONFIGURED, *FLAGGED)
  path: str = ""
  set: Sequence[str] = ()
  seeds: int | None = None
  pool: str | None = None
  title: str = ""
  tries: tuple[Any, ...] = ()
  least: str = "validation/loss"

  def __post_init__(self):
    super().__post_init__()
    if not self.name.isidentifier():
      raise UserError(f"Step.name: found {self.name!r}, expected one word")
    if self.tries and (self.command != "train" or len(self.tries) != 2):
      raise UserError(
        f"Step.tries: found {self.tries} of {self.command!r}, expected a macro"
        " of a training, and its values"
      )
    object.__setattr__(self, "set", tuple(self.set))  # run files have lists

  def candidates(self) -> Iterator[tuple[Any, "Step"]]:
    """Yields each value that is tried, and the step with it."""
    macro, values = self.tries
    for value in values:
      bindings = (*self.set, f"{macro}={value!r}")
      yield value, dataclasses.replace(self, set=bindings, tries=())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline(protocol.Study):
  """Commands, what they cost, and comparisons of what they reach.

  Attributes:
    steps: the commands, each a `Step` or its fields by name; what one needs
      stands before it.
    columns: titles of the table of steps, with the metric of each (`claims`);
      steps without the first are left out; a title ends in a unit of `UNITS`.
    claims: about these metrics, each a `Claim` or its fields by name.
    systems: searches, and what decides in each, by fields; all else names them
      by their titles, or by a step's name if its own choice decides.
    shown: the systems of the table of searches.
    comparisons: claims, each of two systems, by fields.
    curves: systems of the picture by samples, one curve a budget.
    reports: more tables.
    seeds: of training and sampling; the problems are the same for all. None
      for one, where claims have errors over texts or are exact.
    overrides: bindings behind those of a step, by its name.
  """

  steps: Sequence[Step | Mapping[str, Any]]
  columns: Mapping[str, claims.Metric] = dataclasses.field(default_factory=dict)
  claims: Sequence[Claim | Mapping[str, Any]] = ()
  systems: Sequence[System | Mapping[str, Any]] = ()
  shown: Sequence[System | str] = ()
  comparisons: Sequence[Comparison | Mapping[str, Any]] = ()
  curves: Sequence[System | str] = ()
  reports: Sequence[Report] = ()
  seeds: int | None = 3
  overrides: Mapping[str, Sequence[str]] = dataclasses.field(
    default_factory=dict
  )

  def __post_init__(self):
    set_parts(
      self, steps=Step, claims=Claim, systems=System, comparisons=Comparison
    )
    names = [step.name for step in self.steps]
    protocol.distinct(names, "Pipeline.steps")
    self._override(names)
    known = {name: System(step=name) for name in names}
    known |= {system.name: system for system in self.systems}
    for field in ("shown", "comparisons", "curves", "reports"):
      made = with_systems(tuple(getattr(self, field)), known, named=True)
      object.__setattr__(self, field, made)
    every = [*self.shown, *self.curves]
    every += [x for c in self.comparisons for x in (c.first, c.second)]
    every += [x for report in self.reports for x in report.systems]
    needed = {system.step for system in every}
    needed |= {name for claim in self.claims for name in claim.steps}
    for name in sorted(needed - {*names}):
      raise UserError(
        f"Pipeline: found a claim or a system of the step {name!r}, expected"
        f" one of {', '.join(names)}"
      )

  def _override(self, names: Sequence[str]) -> None:
    """Puts the overrides behind the bindings of their steps."""
    for name in self.overrides:
      if name not in names:
        raise UserError(
          f"Pipeline.overrides: found the step {name!r}, expected one of"
          f" {', '.join(names)}"
        )
    steps = [
      dataclasses.replace(x, set=(*x.set, *self.overrides.get(x.name, ())))
      for x in self.steps
    ]
    object.__setattr__(self, "steps", tuple(steps))
    object.__setattr__(self, "overrides", {})  # so that a copy has them once

  @property
  def arms(self) -> list[str]:
    """One for each seed and step, a seed after the other."""
    return [
      _arm(step, seed)
      for seed in range(self.seeds or 1)
      for step in self.steps
      if seed < self._seeds_of(step)
    ]

  def _seeds_of(self, step: Step) -> int:
    seeds = self.seeds or 1
    return seeds if step.seeds is None else min(step.seeds, seeds)

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
      if x is not step and any(f"{{{x.name}}}" in line for line in step.set)
    ]

  def run(self, arm: str, before: Rows, shared: pathlib.Path) -> Row:
    del before
    step, seed = self._step(arm)
    places = {
      x.name: str(_place(x, min(seed, self._seeds_of(x) - 1), shared))
      for x in self.steps
    }
    pathlib.Path(places[step.name]).parent.mkdir(parents=True, exist_ok=True)
    if step.tries:
      return _best(step, places, seed)
    return _run(step, places, seed)

  def summary(self, row: Row) -> str:
    if "accuracy" in row:
      return f"{100 * row['accuracy']:.1f}% right"
    return ", ".join(
      f"{name} {x:.3g}" for name, x in row.items() if isinstance(x, float)
    )

  def table(self, rows: Rows) -> Lines:
    return [
      systems.line(system, found)
      for system in self.shown
      if (found := self.rows_of(system, rows))
    ]

  def tables(self, rows: Rows) -> list[Lines]:
    lines = [self._metrics(rows)] if self.columns else []
    lines += [self.table(rows)] if self.shown else []
    reports = [x.lines(lambda s: self.rows_of(s, rows)) for x in self.reports]
    return [*lines, *reports]

  def _metrics(self, rows: Rows) -> Lines:
    """Returns a line for each step that has the first column's metric."""
    if not self.columns:
      return []
    first, lines = next(iter(self.columns)), []
    for step in self.steps:
      seeds = self._rows_of(step.name, rows)
      values = {
        title: [claims.value(row, metric) for row in seeds]
        for title, metric in self.columns.items()
        if seeds and claims.has(seeds[0], metric)
      }
      if first in values:
        line = {t: stats.over_seeds(x, _unit(t)) for t, x in values.items()}
        lines.append({"step": step.title or step.name, **line})
    return lines

  def rows_of(self, system: System, rows: Rows) -> list[Row]:
    """Returns a system's rows, a seed after the other."""
    return self._rows_of(system.step, rows)

  def _rows_of(self, name: str, rows: Rows) -> list[Row]:
    (step,) = (x for x in self.steps if x.name == name)
    arms = [_arm(step, seed) for seed in range(self._seeds_of(step))]
    return [rows[arm] for arm in arms if arm in rows]

  def verdicts(self, rows: Rows) -> list[Verdict]:
    by_step = {x.name: self._rows_of(x.name, rows) for x in self.steps}
    return [x.verdict(by_step) for x in self.claims] + [
      systems.verdict(x, by_step[x.first.step], by_step[x.second.step])
      for x in self.comparisons
    ]

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves pictures of the first column, and of accuracies against FLOPs."""
    if lines := self._metrics(rows):
      title_of = next(iter(self.columns))
      bars = {}
      for line in lines:
        x = line[title_of]
        x = x if isinstance(x, stats.Mean) else stats.Mean(x, 0.0)
        bars[line["step"]] = x
      size = (8.0, 0.3 * len(bars) + 1.5)
      path = folder / f"{title}_steps.png"
      pictures.bar_panels(path, title, {title_of: bars}, size)
    if self.shown or self.curves:
      points = {x: self.rows_of(x, rows) for x in self.shown}
      curves = {x: self.rows_of(x, rows) for x in self.curves}
      search_pictures.against_flops(
        points, curves, folder / f"{title}.png", title
      )
    for i, report in enumerate(self.reports):
      path = folder / f"{title}_{i + 1}.png"
      report.plot(lambda system: self.rows_of(system, rows), path)


def _unit(title: str) -> float | int:
  return next((x for unit, x in UNITS.items() if title.endswith(unit)), 1)


def _arm(step: Step, seed: int) -> str:
  return f"{step.name}, seed {seed}"


def _place(step: Step, seed: int, shared: pathlib.Path) -> pathlib.Path:
  """Returns a step's working directory, or the file of its labels."""
  suffix = ".jsonl" if step.command == "label" else ""
  return shared / "runs" / f"{step.name}_{seed}{suffix}"


@functools.cache
def _text(step: Step, names: tuple[str, ...], seed: int) -> str:
  """Returns a step's configuration, with names in place of paths."""
  places = {name: name for name in names}
  if step.command in FLAGGED:
    flags = _filled(step, places, seed)
    text = "\n".join([step.command, step.path, *flags])
    if not step.path:
      return text
    bindings = [x.partition("=")[2] for x in flags if x.startswith("--set=")]
    return f"{text}\n{_configured(step, bindings).text}"
  if step.tries:
    every = [candidate for _, candidate in step.candidates()]
    return "\n".join([_read(x, places, seed).text for x in every])
  return _read(step, places, seed).text


def _filled(step: Step, places: Mapping[str, str], seed: int) -> list[str]:
  """Returns a step's bindings or flags with paths in place of names."""
  lines = []
  for line in step.set:
    # Not str.format: a value may have braces of its own.
    for name, place in {**places, "seed": str(seed)}.items():
      line = line.replace(f"{{{name}}}", place)
    lines.append(line)
  return lines


def _read(step: Step, places: Mapping[str, str], seed: int) -> config.Read:
  return _configured(step, _filled(step, places, seed))


def _configured(step: Step, bindings: Sequence[str]) -> config.Read:
  root = ROOTS.get(step.command, Experiment)
  return config.read(step.path, bindings, root)


def _run(step: Step, places: Mapping[str, str], seed: int) -> Row:
  folder = pathlib.Path(places[step.pool or step.name])
  if step.command in FLAGGED:
    return _called(step, places, seed)
  read = _read(step, places, seed)
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


def _called(step: Step, places: Mapping[str, str], seed: int) -> Row:
  """Runs a command with flags, as its command line does.

  Raises:
    UserError: it failed; it has said why.
  """
  place = pathlib.Path(places[step.name])
  if place.exists():  # of a command that was interrupted
    shutil.rmtree(place)
  file = place.with_name(f"{place.name}.json")
  main = importlib.import_module(f"experiments.{step.command}").main
  arguments = [f"--config={step.path}"] if step.path else []
  arguments += [*_filled(step, places, seed), f"--result={file}"]
  if status := cli.call(main, [step.command, *arguments]):
    raise UserError(
      f"{step.name}: the command {step.command} {' '.join(arguments)} ended"
      f" with status {status}"
    )
  return json.loads(file.read_text("utf-8"))


def _best(step: Step, places: Mapping[str, str], seed: int) -> Row:
  """Runs a training with each value; returns the row of the best one.

  Its directory is then the step's; `at` is its value, `inside` whether values
  on both sides of it were worse, and `tried` what each one reached.
  """
  place, rows = pathlib.Path(places[step.name]), []
  for i, (value, candidate) in enumerate(step.candidates()):
    row = _run(candidate, {**places, step.name: _try(place, i)}, seed)
    cli.say(f"{step.name} at {value}: {row.get(step.least)}")
    rows.append(row | {"at": value})
  losses = [claims.value(row, step.least) for row in rows]
  best = int(np.nanargmin(losses))
  place.unlink(missing_ok=True)
  place.symlink_to(pathlib.Path(_try(place, best)).name)
  return rows[best] | {
    "inside": 0 < best < len(rows) - 1,
    "tried": {str(row["at"]): x for row, x in zip(rows, losses, strict=True)},
  }


def _try(place: pathlib.Path, index: int) -> str:
  return f"{place}_try_{index}"


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
    whole["errors"] = wrong_answers.errors_of(pool, run.choice.aggregate)
  return whole | {
    "each": [round(x, 6) for x in each],
    "right": [sum(x.correct for x in one.samples) for one in pool],
    "samples": [len(one.samples) for one in pool],
    "prompt_flops_policy": float(
      np.mean([one.prompt_ledger.flops_policy for one in pool])
    ),
  }
