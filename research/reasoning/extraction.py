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
_PHRASE = re.compile(
  r"\banswers?\b[*_]*\s*(?:(?:(?:to|for|of) [^\n.:=?]{1,80}? )?"
  # "answer isn't", "answer is not" and "answer issues" name none; "would be"
  # is of another case.
  r"(?:(?:is|are)(?![a-z'’])|(?:equals|(?:should|must|will) be)\b)"
  r"(?!\s+(?:not|never|neither)\b)[*_]*[:=]?|[:=])"
  r"|(?:(?<=# )|(?<=\*\*))(?:final +)?answer[*_]*[ \t]*(?=\n)",
  re.IGNORECASE,
)
_ADVERB = re.compile(
  r"(?:(?:therefore|thus|then|hence|simply|just|indeed|clearly|actually),?\s+"
  r")+(?=\S)"
)
# Reasons name no other answer, whatever is in them; asides name none if they
# have neither a number nor a choice.
_REASON = re.compile(
  r"(?:[,;]|\s[-–—])?\s(?:because|since)\s.*"
  r"|(?:[,;]|\s[-–—])\s(?:which|where|as(?! well)|not)\s.*"
)
_ASIDE = re.compile(
  r"(?:[,;]|\s[-–—])\s(?:I|we|you|right|of course|I['’]m)\b"
  r"(?:(?!\b(?:or|and|but)\b)[^\d$\\])*$"
)
_PAST_SPACES = re.compile(r"\s*")
_END = re.compile(r"(\?(?=[*\s]|$)|\. )")
_LONGEST = 2_000  # characters; so the time is linear in a text's
_FORMULAS = ("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)")
_OF_ITSELF = (
  *("clear", "obvious", "simple", "easy", "correct", "right", "wrong"),
  *("incorrect", "below", "above"),
)
"""What is said of an answer that stands elsewhere."""


def gsm8k_strict(text: str) -> str | None:
  """Returns the number after the first `####`.

  lm-evaluation-harness' filter `strict-match` of the task gsm8k.
  """
  match = _STRICT.search(text)
  return match.group(1) if match else None


def gsm8k_flexible(text: str) -> str | None:
  """Returns the last number, or what looks like one.

  lm-evaluation-harness' filter `flexible-extract` of the task gsm8k, which may
  return "$5." or ".,"; `grading.ExactMatch` removes what it should ignore.
  """
  match = None
  for match in _FLEXIBLE.finditer(text):  # noqa: B007
    pass
  return (match.group(1) or match.group(2)).strip() if match else None


def last_number(text: str) -> str | None:
  """Returns the last number, without commas of thousands or a full stop."""
  numbers = _NUMBER.findall(text)
  return numbers[-1].replace(",", "").replace("−", "-") if numbers else None


def answer_tag(text: str) -> str | None:
  """Returns what the last `<answer>...</answer>` has, as reasoning-gym does."""
  answer, at = None, 0
  while (start := text.find(_OPEN, at)) >= 0:
    stop = text.find(_CLOSE, start)
    if stop < 0:
      break
    answer = text[start + len(_OPEN) : stop].strip()
    at = stop + len(_CLOSE)
  return answer


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
  """Returns what the last phrase such as "answer is" or "answer:" names.

  It is on the phrase's line, or on the next that is not blank, without what
  sets it off (dollars of a formula, asterisks of bold type) and without a
  reason or an aside behind it. A question names none, and "the answer is
  correct" does only if no other phrase does.
  """
  last = None
  for phrase in reversed(list(_PHRASE.finditer(text))):
    answer = _named(text, phrase.end())
    if answer and answer.lower() not in _OF_ITSELF:
      return answer
    last = last or answer
  return last


def _named(text: str, at: int) -> str | None:
  """Returns the answer that begins at a position; None for a question."""
  start = _PAST_SPACES.match(text, at).end()
  below = "\n" in text[at:start]
  for opening, closing in _FORMULAS:
    if text.startswith(opening, start):
      stop = text.find(closing, start + 2, start + _LONGEST)
      behind = text[stop + 2 : stop + 20].partition("\n")[0]
      if stop > 0 and not behind.strip(".* "):
        return text[start + 2 : stop].strip().rstrip(".,") or None
  line = text[start : start + _LONGEST].partition("\n")[0]
  sentence, end, _ = (*_END.split(line, maxsplit=1), "", "")[:3]
  if end.startswith("?"):
    return None
  if below:
    sentence = re.sub(r"^[-*•] +", "", sentence)
  sentence = sentence.strip().strip("*").removesuffix(".")
  # An asterisk within dollars is of the formula: $x^*$.
  sentence = _ADVERB.sub("", sentence.strip("* \t"), count=1)
  sentence = _ASIDE.sub("", _REASON.sub("", sentence)).rstrip(",;* \t")
  sentence = re.sub(r"(?<!\\)\$|\\[()\[\]]", "", sentence)
  return sentence.strip() or None


def boxed_or_phrase(text: str) -> str | None:
  r"""Returns the last `\boxed{...}`; without any box, the answer's phrase."""
  return boxed(text) if _BOX.search(text) else answer_phrase(text)


def whole(text: str) -> str | None:
  """Returns all of the text; None if it is blank."""
  return text.strip() or None


def boxed_or_hash(text: str) -> str | None:
  r"""Returns the last `\boxed{...}`; without any box, the number after ####."""
  return boxed(text) if _BOX.search(text) else gsm8k_strict(text)
