"""Parsers: from what a model writes to one of a question's answers.

A parser is a function of the text and the possible answers; None is an invalid
answer, which is wrong and counted. A score says little without its parser: a
verbose model has 0 by one, and by another a model that never says no is right
about all that is there.
"""

import re
from collections.abc import Callable, Sequence

from research.vlm.evaluation.answers import NUMBERS

Parser = Callable[[str, Sequence[str]], str | None]
"""(text, choices) -> the answer; without choices the text itself."""

_LETTER = r"[\w'-]"
"""Of a word."""


def exact_choice(text: str, choices: Sequence[str]) -> str | None:
  """Returns the choice that the text is, but for case and a full stop.

  What lmms-eval calls an exact match, for POPE too.
  """
  text = text.strip().removesuffix(".")
  if not choices:
    return text
  return next((x for x in choices if x.lower() == text.lower()), None)


def first_choice(text: str, choices: Sequence[str]) -> str | None:
  """Returns the choice that occurs first in the text, as words of its own.

  Choices of several words count where there is none of one word. Number words
  that are no choice count as figures: "There are two." is "2".
  """
  if not choices:
    return text.strip()
  known = {x.lower(): x for x in choices}
  for word in re.findall(rf"{_LETTER}+", text.lower()):
    if word not in known:
      word = NUMBERS.get(word, word)
    if word in known:
      return known[word]
  found = []
  for x in known:
    alone = rf"(?<!{_LETTER}){re.escape(x)}(?!{_LETTER})"
    if " " in x and (place := re.search(alone, text.lower())):
      found.append((place.start(), known[x]))
  return min(found)[1] if found else None


def llava_yes_no(text: str, choices: Sequence[str] = ()) -> str | None:
  """Returns "no" where the first sentence has "No", "no" or "not", else "yes".

  LLaVA's evaluation of POPE (llava/eval/eval_pope.py): nothing is invalid, and
  whatever is unclear is a yes.
  """
  words = text.split(".")[0].replace(",", "").split(" ")
  return "no" if {"No", "no", "not"} & set(words) else "yes"


def mme_yes_no(text: str, choices: Sequence[str] = ()) -> str | None:
  """Returns "yes" or "no" as MME's evaluation reads them, else None.

  The text is one of them or its first letter, or the first four characters
  have one of them.
  """
  text = text.lower().strip().replace(".", "")
  if len(text) == 1:
    return {"y": "yes", "n": "no"}.get(text)
  return next((x for x in ("yes", "no") if x in text[:4]), None)
