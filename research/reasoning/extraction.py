r"""From a model's text to the one answer in it, or None.

Each extractor is a function from text to text. None means that nothing was
answered: no vote, and no credit. Where a convention admits several answers the
last one counts, so that a text cannot hedge by naming two.
"""

import re
from collections.abc import Callable

Extractor = Callable[[str], str | None]

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
# Behind a number, its unit, a letter or a bracket, a sign is an operator, or a
# dash.
_NUMBER = re.compile(
  r"(?:(?<![\w.)\]}%°])[-−])?(?:\d+(?:,\d{3})*(?:\.\d+)?|(?<![\w.])\.\d+)"
)
_OPEN, _CLOSE = "<answer>", "</answer>"
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
# "answer isn't" and "answer issues" have none.
_PHRASE = re.compile(r"answer(?: is(?![a-z'’]):?|:)", re.IGNORECASE)


def gsm8k_strict(text: str) -> str | None:
  """Returns the number after the first `####`.

  lm-evaluation-harness' filter `strict-match` of the task gsm8k.
  """
  found = _STRICT.search(text)
  return found.group(1) if found else None


def gsm8k_flexible(text: str) -> str | None:
  """Returns the last number, or what looks like one.

  lm-evaluation-harness' filter `flexible-extract` of the task gsm8k, which may
  return "$5." or ".,"; `grading.ExactMatch` removes what it should ignore.
  """
  found = None
  for found in _FLEXIBLE.finditer(text):  # noqa: B007
    pass
  return (found.group(1) or found.group(2)).strip() if found else None


def last_number(text: str) -> str | None:
  """Returns the last number, without commas of thousands or a full stop."""
  found = _NUMBER.findall(text)
  return found[-1].replace(",", "").replace("−", "-") if found else None


def answer_tag(text: str) -> str | None:
  """Returns what the last `<answer>...</answer>` has, as reasoning-gym does."""
  found, at = None, 0
  while (start := text.find(_OPEN, at)) >= 0:
    stop = text.find(_CLOSE, start)
    if stop < 0:
      break
    found = text[start + len(_OPEN) : stop].strip()
    at = stop + len(_CLOSE)
  return found


def boxed(text: str) -> str | None:
  r"""Returns what the last `\boxed{...}` has; braces may be nested.

  `\fbox` counts, and so does `\boxed 5`. None if the last box has no end: the
  text was cut within its answer, and an earlier box is not meant.
  """
  last = None
  for last in _BOX.finditer(text):  # noqa: B007
    pass
  if last is None:
    return None
  rest = text[last.end() :]
  if not rest.startswith("{"):
    return re.split(r"[$\s]", rest.strip(), maxsplit=1)[0].rstrip(".") or None
  depth = i = 0
  while i < len(rest):
    if rest[i] == "\\":  # an escaped brace is a character of the answer
      i += 2
      continue
    depth += {"{": 1, "}": -1}.get(rest[i], 0)
    i += 1
    if not depth:
      return rest[1 : i - 1].strip() or None
  return None


def answer_phrase(text: str) -> str | None:
  """Returns what follows the last "answer is" or "answer:" on its line.

  Without what sets it off: dollars of a formula, and asterisks of bold type.
  """
  last = None
  for last in _PHRASE.finditer(text):  # noqa: B007
    pass
  if last is None:
    return None
  line = text[last.end() :].partition("\n")[0]
  sentence = line.partition(". ")[0]
  sentence = sentence.strip().strip("*").removesuffix(".")
  # An asterisk within dollars is of the formula: $x^*$.
  return sentence.strip("* \t").strip("$ \t") or None


def boxed_or_phrase(text: str) -> str | None:
  r"""Returns the last `\boxed{...}`; without any box, the answer's phrase."""
  return boxed(text) if _BOX.search(text) else answer_phrase(text)


def whole(text: str) -> str | None:
  """Returns all of the text; None if it is blank."""
  return text.strip() or None


def boxed_or_hash(text: str) -> str | None:
  r"""Returns the last `\boxed{...}`; without any box, the number after ####."""
  return boxed(text) if _BOX.search(text) else gsm8k_strict(text)
