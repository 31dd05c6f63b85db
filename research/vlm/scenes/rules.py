"""Rule baselines: answers from a part of what a question needs.

A model that beats a blind one may still ignore a word of the question. "Yes
where the colour occurs anywhere" answers many questions about red squares; a
score means something above the best such rule, on the same items.

A rule is a function from samples to answers, None where it does not apply.
"""

import collections
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from research.vlm.scenes.sample import Sample

Rule = Callable[[Sequence[Sample]], list[str | None]]


@dataclasses.dataclass(frozen=True)
class PerSample:
  """Answers one sample at a time.

  Attributes:
    answer: of a sample; None where the rule does not apply.
    kinds: of questions that it applies to; empty for all.
  """

  answer: Callable[[Sample], str | None]
  kinds: tuple[str, ...] = ()

  def __call__(self, samples: Sequence[Sample]) -> list[str | None]:
    return [
      self.answer(x) if not self.kinds or x.kind in self.kinds else None
      for x in samples
    ]


@dataclasses.dataclass(frozen=True)
class BestGiven:
  """The most frequent answer to a question, given a part of the scene.

  Attributes:
    information: what it knows of a sample, besides the question's text.
    kinds: of questions that it applies to; empty for all.
    counts: answers for each (question, information), and for each question;
      empty for those of the samples that it answers. These flatter: of two
      answers to a text, it has one right.
  """

  information: Callable[[Sample], Hashable]
  kinds: tuple[str, ...] = ()
  counts: Mapping[Hashable, Mapping[str, int]] = dataclasses.field(
    default_factory=dict
  )

  def fit(self, samples: Iterable[Sample]) -> "BestGiven":
    """Returns the rule with the answers of other samples."""
    counts = collections.defaultdict(collections.Counter)
    for x in samples:
      if not self.kinds or x.kind in self.kinds:
        counts[x.question, self.information(x)][x.answer] += 1
        counts[x.question][x.answer] += 1
    return dataclasses.replace(self, counts=counts)

  def __call__(self, samples: Sequence[Sample]) -> list[str | None]:
    """Returns an answer for each sample; the first choice to a new text."""
    rule = self if self.counts else self.fit(samples)
    return [rule._answer(x) for x in samples]

  def _answer(self, sample: Sample) -> str | None:
    if self.kinds and sample.kind not in self.kinds:
      return None
    for key in (sample.question, self.information(sample)), sample.question:
      if found := self.counts.get(key):
        return min(found, key=lambda answer: (-found[answer], answer))
    return sample.choices[0] if sample.choices else ""


MAJORITY = BestGiven(lambda sample: ())
"""The most frequent answer to the question's text: the best blind one."""


def yes_no(holds: object) -> str:
  """Returns "yes" or "no"."""
  return "yes" if holds else "no"


# Of questions about a colour and a shape -----------------------------------


def question_part(sample: Sample, part: str) -> str:
  """Returns what the question names, "" where it names no such part."""
  return str(sample.program.get(part, ""))


def _counts(sample: Sample) -> tuple[int, int] | None:
  """Returns how many objects have the colour, and how many the shape.

  None where only one of them is asked about: then it is all that counts.
  """
  colour, shape = (
    question_part(sample, "colour"),
    question_part(sample, "shape"),
  )
  if not colour or not shape:
    return None
  return sample.count(colour=colour), sample.count(name=shape)


def _from_counts(choose: Callable[[int, int], int]) -> PerSample:
  def answer(sample: Sample) -> str | None:
    if (counts := _counts(sample)) is None:
      return None
    found = choose(*counts)
    return str(found) if sample.kind == "count" else yes_no(found)

  return PerSample(answer, ("count", "exists"))


ATTRIBUTES: Mapping[str, Rule] = {
  "colour only": _from_counts(lambda colour, shape: colour),
  "shape only": _from_counts(lambda colour, shape: shape),
  "both somewhere": _from_counts(min),
}
"""Answers from one attribute, and from both without asking who has which."""
