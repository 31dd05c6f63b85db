"""A report: a model's score beside those of its baselines, by stratum."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from research import intervals, tables
from research.typing import Bool, Float, UserError
from research.vlm.evaluation.yes_no import YesNoScores, yes_no_scores
from research.vlm.scenes.sample import YES_NO, Sample

REAL, BLIND, SHUFFLED = "real", "blind", "shuffled"
"""The model with its images, with zeros, and with other samples' images."""


class Result(NamedTuple):
  """A mean score and its interval.

  Attributes:
    score: mean over samples, 0 to 1.
    low: of the interval.
    high: of the interval.
    n: number of samples.
  """

  score: float
  low: float
  high: float
  n: int


class Margin(NamedTuple):
  """How far the model is above its best baseline.

  Attributes:
    baseline: the name of the best one in this group.
    difference: of mean scores.
    low: of the interval, over the same samples for both.
    high: of the interval.
  """

  baseline: str
  difference: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Report:
  """Answers and scores of a model and its baselines on the same samples.

  Attributes:
    samples: without their images.
    texts: what the model wrote: with real, blind and shuffled images.
    answers: parsed from these; None is invalid.
    scores: of these and of each rule, 0 to 1; NaN where a rule does not apply.
  """

  samples: Sequence[Sample]
  texts: Mapping[str, Sequence[str]]
  answers: Mapping[str, Sequence[str | None]]
  scores: Mapping[str, Float[np.ndarray, "B"]]

  def within(
    self, kind: str = "", stratum: str = "", answer: str = ""
  ) -> Bool[np.ndarray, "B"]:
    """Returns which samples are of a kind, a stratum and an answer; "" is all.

    Raises:
      UserError: none is.
    """
    found = np.array(
      [
        kind in ("", x.kind)
        and stratum in ("", x.stratum)
        and answer in ("", x.answer)
        for x in self.samples
      ]
    )
    if not found.any():
      raise UserError(
        f"Report: found no sample of kind {kind!r}, stratum {stratum!r} and"
        f" answer {answer!r}; there are"
        f" {', '.join(map(repr, self.groups()))}."
      )
    return found

  def groups(self) -> list[tuple[str, str]]:
    return sorted({(x.kind, x.stratum) for x in self.samples})

  def systems(
    self, kind: str = "", stratum: str = "", answer: str = ""
  ) -> list[str]:
    """Returns the model's and the rules that answer the whole group.

    Where a group has one answer, rules do not count: one of them always says
    it, whatever the image is.
    """
    group = self.within(kind, stratum, answer)
    return [
      name
      for name, scores in self.scores.items()
      if not np.isnan(scores[group]).any()
      and (not answer or name in self.texts)
    ]

  def counts(self, kind: str) -> list[str]:
    """Returns the answers of a kind whose choices are numbers, in order."""
    some = [x for x in self.samples if x.kind == kind]
    choices = {choice for x in some for choice in x.choices or ("",)}
    if not all(x.isdecimal() for x in choices):
      return []
    return sorted({x.answer for x in some}, key=int)

  def result(
    self,
    system: str = REAL,
    kind: str = "",
    stratum: str = "",
    answer: str = "",
  ) -> Result:
    scores = self.scores[system][self.within(kind, stratum, answer)]
    low, high, _ = intervals.of_share(scores)
    return Result(float(scores.mean()), low, high, len(scores))

  def margin(
    self, kind: str = "", stratum: str = "", answer: str = ""
  ) -> Margin:
    """Returns how far the model is above the best of its baselines.

    A rule counts where it answers the whole group. The interval is that of the
    mean difference by sample; that the best was chosen by these samples makes
    it, if anything, too low.
    """
    group = self.within(kind, stratum, answer)
    names = [x for x in self.systems(kind, stratum, answer) if x != REAL]
    best = max(names, key=lambda name: self.scores[name][group].mean())
    apart = self.scores[REAL][group] - self.scores[best][group]
    low, high, _ = intervals.of_difference(apart)
    return Margin(best, float(apart.mean()), low, high)

  def invalid(
    self,
    system: str = REAL,
    kind: str = "",
    stratum: str = "",
    answer: str = "",
  ) -> float:
    """Returns the share of the model's answers that no parser could read."""
    group = self.within(kind, stratum, answer)
    answers = self.answers[system]
    return float(np.mean([answers[i] is None for i in np.flatnonzero(group)]))

  def yes_no(
    self, system: str = REAL, kind: str = "", stratum: str = ""
  ) -> YesNoScores:
    """Returns POPE's numbers of a group of yes-no questions.

    Raises:
      UserError: the group has other questions.
    """
    some = np.flatnonzero(self.within(kind, stratum))
    return yes_no_scores(
      [self.answers[system][i] for i in some],
      [self.samples[i].answer for i in some],
    )

  def _rows(self, kind: str) -> Iterator[tuple[str, str, str]]:
    """Yields (title, kind, stratum) of the rows of a kind's table."""
    strata = [s for k, s in self.groups() if k == kind]
    if len(strata) > 1:
      yield from ((stratum, kind, stratum) for stratum in strata)
    yield "all", kind, ""

  def _table(self, kind: str) -> list[list[str]]:
    groups = list(self._rows(kind)) if kind else [("all", "", "")]
    answering = {
      name: None for _, *group in groups for name in self.systems(*group)
    }
    columns = [name for name in self.scores if name in answering][1:]
    some = [x for x in self.samples if kind in ("", x.kind)]
    binary = all(x.choices == YES_NO for x in some)
    head = [kind or "all kinds", "n", "real", "95%", *columns]
    rows = [[*head, "above best", "95%", "invalid", *["yes"] * binary]]
    for title, *group in groups:
      systems = self.systems(*group)
      real, margin = self.result(REAL, *group), self.margin(*group)
      rows.append(
        [
          title,
          f"{real.n:,}",
          _percent(real.score),
          f"{_percent(real.low)} to {_percent(real.high)}",
          *(
            _percent(self.result(name, *group).score) if name in systems else ""
            for name in columns
          ),
          _percent(margin.difference),
          f"{_percent(margin.low)} to {_percent(margin.high)}",
          _percent(self.invalid(REAL, *group)),
        ]
      )
      if binary:
        rows[-1].append(_percent(self.yes_no(REAL, *group).yes_ratio))
    return rows

  def _tables(self) -> list[list[list[str]]]:
    kinds = sorted({x.kind for x in self.samples})
    return [self._table(x) for x in kinds + [""] * (len(kinds) > 1)]

  def __str__(self) -> str:
    """Returns a table for each kind of question, in per cent."""
    return "\n\n".join(
      "\n".join(tables.aligned(x, right=range(1, len(x[0]))))
      for x in self._tables()
    )

  def markdown(self) -> str:
    """Returns the same tables as Markdown."""
    return "\n\n".join(tables.markdown(x[0], x[1:]) for x in self._tables())

  def to_json(self) -> dict[str, Any]:
    """Returns scores, intervals and margins by group, of plain values.

    Groups are all samples, each kind, "kind/stratum", and for kinds whose
    answers are numbers "kind = answer", with the model's own baselines alone.
    """
    kinds = list(dict(self.groups()))
    named = {"all": (), **{kind: (kind,) for kind in kinds}}
    named |= {"/".join(group): group for group in self.groups()}
    named |= {
      f"{kind} = {answer}": (kind, "", answer)
      for kind in kinds
      for answer in self.counts(kind)
    }
    return {
      name: {
        "margin": self.margin(*group)._asdict(),
        "invalid": self.invalid(REAL, *group),
        "systems": {
          system: self.result(system, *group)._asdict()
          for system in self.systems(*group)
        },
      }
      for name, group in named.items()
    }


def _percent(share: float) -> str:
  return f"{100 * share:.1f}"
