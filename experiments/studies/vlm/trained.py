"""A study of run files: each is trained with several seeds, as it stands.

Its arms are experiments, so what a run file's header claims is measured by the
code that users run: `experiments.train`, and its report of answers.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from experiments.core import config
from experiments.core.stats import Mean, above, mean, paired
from experiments.stages import running, staged
from experiments.studies import protocol
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.typing import UserError
from research.vlm.evaluation.report import BLIND, REAL, SHUFFLED

COLUMNS = {REAL: "right, %", BLIND: "blind", SHUFFLED: "shuffled"}
"""Systems of a report, and their titles in the table."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFile:
  """A run file, and what its answers must reach.

  Attributes:
    path: below `configs/`.
    groups: kinds or strata ("exists/both") that the verdict is of.
    strata: further ones that the table shows.
    margin: share of right answers above the best baseline, in the mean over
      groups, that the claim says; 0 for any.
  """

  path: str
  groups: tuple[str, ...]
  strata: tuple[str, ...] = ()
  margin: float | int = 0.25

  @property
  def name(self) -> str:
    """The file's, without folder and suffix."""
    return pathlib.PurePosixPath(self.path).stem

  def read(self, seed: int) -> config.Read:
    """Returns the experiment with a seed.

    Raises:
      UserError: it asks its model nothing.
    """
    found = config.read(self.path, [f"SEED={seed}"])
    if staged.final(found.experiment).answers is None:
      raise UserError(
        f"{self.path}: found no Experiment.answers, expected the questions for"
        " the trained model"
      )
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained(protocol.Study):
  """Run files, trained with several seeds.

  Attributes:
    files: the run files.
    seeds: of weights and order; the questions are the same for all.
    first_is_best: whether the first file is said to be right more often than
      each of the others, in the mean over its groups, paired by seeds.
  """

  files: tuple[RunFile, ...]
  seeds: int = 3
  first_is_best: bool = False

  def __post_init__(self):
    protocol.distinct([x.name for x in self.files], "Trained.files")

  @property
  def arms(self) -> list[str]:
    """One for each seed and file."""
    seeds = range(self.seeds)
    return [f"{x.name}, seed {s}" for x in self.files for s in seeds]

  def _file(self, arm: str) -> tuple[RunFile, int]:
    name, seed = arm.rsplit(", seed ", 1)
    (found,) = (x for x in self.files if x.name == name)
    return found, int(seed)

  def settings(self, arm: str) -> str:
    """Returns what the arm's run file says."""
    file, seed = self._file(arm)
    return file.read(seed).text

  def run(self, arm: str, before: Rows, shared: pathlib.Path) -> Row:
    """Returns the report of the trained model's answers."""
    del before
    file, seed = self._file(arm)
    read = file.read(seed)
    folder = shared / "runs" / f"{file.name}_{seed}"
    workdir = running.claim(read.experiment, read.text, folder)
    result = running.train(read.experiment, workdir)
    return {
      "answers": result["answers"],
      "parameters": result["total_parameters"],
    }

  def summary(self, row: Row) -> str:
    """Returns the share of right answers to all questions."""
    found = row["answers"]["all"]["systems"][REAL]
    return f"{100 * found['score']:.1f}% right"

  # --- what the rows say ---

  def _found(self, rows: Rows, file: RunFile) -> list[Row]:
    arms = [f"{file.name}, seed {s}" for s in range(self.seeds)]
    return [rows[arm]["answers"] for arm in arms if arm in rows]

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each file and group, in per cent of right answers."""
    out = []
    for file in self.files:
      found = self._found(rows, file)
      shown = (*file.groups, *file.strata) if found else ()
      out += [_line(file.name, group, found) for group in shown]
    return out

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns whether files' models are above baselines, and each other."""
    out = [_verdict(x, self._found(rows, x)) for x in self.files]
    if self.first_is_best:
      first = self.files[0]
      scores = [_scores(self._found(rows, x), first.groups) for x in self.files]
      out += [
        _better(first, other, paired(scores[0], found))
        for other, found in zip(self.files[1:], scores[1:], strict=True)
      ]
    return out


def _line(name: str, group: str, reports: list[Row]) -> dict[str, Any]:
  line = {"run": name, "group": group}
  line["n"] = reports[0][group]["systems"][REAL]["n"]
  for system, title in COLUMNS.items():
    scores = [x[group]["systems"][system]["score"] for x in reports]
    line[title] = mean(scores).times(100)
  rules = {
    name: mean([x[group]["systems"][name]["score"] for x in reports]).value
    for name in reports[0][group]["systems"]
    if name not in COLUMNS
  }
  # "count = 3" has none: a rule that always says 3 has all of it right.
  best = max(rules, key=lambda name: rules[name], default="")
  line["best rule"] = best and f"{best}: {100 * rules[best]:.1f}"
  margins = [x[group]["margin"]["difference"] for x in reports]
  line["above the best of all"] = mean(margins).times(100)
  return line


def _verdict(file: RunFile, reports: list[Row]) -> Verdict:
  margins = {
    group: [x[group]["margin"]["difference"] for x in reports]
    for group in file.groups
  }
  overall = mean(np.mean(list(margins.values()), axis=0))
  each = ", ".join(f"{g}: {mean(x).times(100)}" for g, x in margins.items())
  points = f" {100 * file.margin:g} points" if file.margin else ""
  return Verdict(
    f"{file.name}: right answers are{points} above the best of blind, shuffled"
    f" and rules, in the mean over {', '.join(file.groups)}",
    f"{overall.times(100)} points ({each})",
    above(overall, file.margin),
  )


def _scores(reports: list[Row], groups: tuple[str, ...]) -> list[float]:
  """Returns the mean share of right answers over groups, by seed."""
  return [
    float(np.mean([x[group]["systems"][REAL]["score"] for group in groups]))
    for x in reports
  ]


def _better(first: RunFile, other: RunFile, apart: Mean) -> Verdict:
  return Verdict(
    f"{first.name} is right more often than {other.name}, in the mean over"
    f" {', '.join(first.groups)}",
    f"{apart.times(100)} points",
    above(apart),
  )
