r"""Where one step of a solution ends and the next begins.

`split(text)` returns `[start, stop)` of every step. Joined, steps are the text;
each keeps the separator behind it, none is blank, and splitting one again
leaves it alone. A text that ends with a separator has no empty last step, and a
blank text has no step at all: a model would score nothing there.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from research.errors import UserError

Span = tuple[int, int]

FENCES = (("```", "```"), ("$$", "$$"), (r"\[", r"\]"))
"""Code and displayed formulas: what a blank line within should not split."""


@runtime_checkable
class Segmenter(Protocol):
  """Splits a text into steps."""

  def split(self, text: str) -> list[Span]:
    """Returns where steps start and stop, in characters."""
    ...


def steps_of(segmenter: Segmenter, text: str) -> list[str]:
  """Returns the steps of a text, separators included."""
  return [text[start:stop] for start, stop in segmenter.split(text)]


@dataclasses.dataclass(frozen=True)
class Separator:
  r"""Steps that end with a separator.

  Attributes:
    pattern: regular expression of the separator, which matches no empty text.
    fences: pairs of marks between which separators do not count.
  """

  pattern: str
  fences: tuple[tuple[str, str], ...] = ()

  def __post_init__(self):
    if re.search(self.pattern, ""):
      raise UserError(
        f"Separator.pattern: found {self.pattern!r}, which matches an empty"
        " text, expected one that matches a separator alone."
      )

  def split(self, text: str) -> list[Span]:
    closed = _fenced(text, self.fences)
    ends = (
      x.end()
      for x in re.finditer(self.pattern, text)
      if not any(start < x.start() < stop for start, stop in closed)
    )
    return _spans(text, ends)


@dataclasses.dataclass(frozen=True)
class Header:
  """Steps that begin with a header; what stands before the first joins it.

  Attributes:
    pattern: regular expression of the header, in multi-line mode.
  """

  pattern: str

  def split(self, text: str) -> list[Span]:
    headers = re.finditer(self.pattern, text, re.MULTILINE)
    return _spans(text, [x.start() for x in headers][1:])


@dataclasses.dataclass(frozen=True)
class Whole:
  """One step: what an outcome reward model scores."""

  def split(self, text: str) -> list[Span]:
    """Returns all of the text, unless it is blank."""
    return _spans(text, ())


BLANK_LINE = Separator(r"\n\n+")
"""Qwen2.5-Math, RLHFlow, search-and-learn, compute-optimal-tts."""

BLANK_LINE_FENCED = Separator(r"\n\n+", FENCES)
"""The same, but code and displayed formulas stay whole."""

NEWLINE = Separator(r"\n+")
"""Skywork, PURE, and TRL's default."""

TAG = Separator(r"ки\n*(?:\s*ки\n*)*")
"""Math-Shepherd and ER-PRM: a Cyrillic tag that is one token of Mistral's.

Here and below, a tag that is doubled ends one step: it is none itself.
"""

EXTRA_0 = Separator(r"<extra_0>(?:\s*<extra_0>)*")
"""What Qwen2.5-Math-PRM reads."""

OPENR = Separator(r" \n\n\n\n\n")
"""What OpenR's math-psa reads."""

PRM_TAG = Separator(r" \[PRM\]\n*(?:\s*\[PRM\]\n*)*")
"""What PQM reads."""

STEP_HEADER = Header(r"^Step \d+:")
"""Math-Shepherd's steps, without tags."""

LLAMA_HEADER = Header(r"^## Step \d+:")
"""The Llama recipe of search-and-learn."""

SEMICOLON = Separator(r";\s*")
"""Our countdown and chains of sums."""

SEGMENTERS = {
  "blank_line": BLANK_LINE,
  "blank_line_fenced": BLANK_LINE_FENCED,
  "newline": NEWLINE,
  "tag": TAG,
  "extra_0": EXTRA_0,
  "openr": OPENR,
  "prm_tag": PRM_TAG,
  "step_header": STEP_HEADER,
  "llama_header": LLAMA_HEADER,
  "semicolon": SEMICOLON,
  "whole": Whole(),
}
"""By the name that data files give as `segmenter_id`."""


def _spans(text: str, ends: Iterable[int]) -> list[Span]:
  """Returns the steps between boundaries; a blank one joins its neighbour."""
  spans: list[Span] = []
  start = 0
  for stop in (*ends, len(text)):
    if text[start:stop].strip():
      spans.append((start, stop))
      start = stop
    elif spans:
      spans[-1] = spans[-1][0], stop
      start = stop
  return spans


def _fenced(text: str, fences: Sequence[tuple[str, str]]) -> list[Span]:
  """Returns from where to where fences reach; one that never closes, on."""
  spans, at = [], 0
  while True:
    places = [(_place(text, x, at), x, y) for x, y in fences]
    places = [x for x in places if x[0] >= 0]
    if not places:
      return spans
    start, opening, closing = min(places)
    stop = _place(text, closing, start + len(opening))
    if stop < 0:
      return [*spans, (start, len(text) + 1)]
    at = stop + len(closing)
    spans.append((start, at))


def _place(text: str, mark: str, at: int) -> int:
  r"""Returns where a mark is next, or -1; the line break `\\[4pt]` has none."""
  while (at := text.find(mark, at)) >= 0:
    escapes = at - len(text[:at].rstrip("\\"))
    if not mark.startswith("\\") or escapes % 2 == 0:
      return at
    at += 1
  return -1
