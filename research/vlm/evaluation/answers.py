r"""Normal forms of short answers, as VQA's evaluation makes them.

Antol et al. 2015, "VQA: Visual Question Answering", and the server EvalAI: no
articles, number words as figures, apostrophes put back, punctuation removed.
The forms are quirky and scores depend on it, so the quirks stay:

* a character of punctuation becomes a space, but nothing where the text has it
  next to a space, or has a comma between figures anywhere ("1,000 a-b");
* a full stop goes unless a figure follows it, and of these the first 32;
* "somebody'd" loses its apostrophe, which others get.
"""

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_STOPS = 32
_ARTICLES = frozenset(("a", "an", "the"))
NUMBER_WORDS = (
  *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight"),
  *("nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen"),
  *("sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
NUMBERS = {word: str(i) for i, word in enumerate(NUMBER_WORDS[:11])}
NUMBERS["none"] = "0"

_CONTRACTED = """
  ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
  hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd
  it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
  not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
  shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
  someone'll someone's something'd something'd've something'll that's there'd
  there'd've there're there's they'd they'd've they'll they're they've 'twas
  wasn't we'd've we've weren't what'll what're what's what've when's where'd
  where's where've who'd who'd've who'll who's who've why'll why're why's won't
  would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
  you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
  return [
    word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"
  ]


CONTRACTIONS = {
  written: word
  for word in _CONTRACTED.split()
  for written in _without_one_apostrophe(word)
} | {"somebody'd": "somebodyd"}
"""A word with one apostrophe missing -> the word."""


def _strip_punctuation(text: str) -> str:
  joined = _COMMA_IN_NUMBER.search(text) is not None
  out = text
  for mark in _PUNCTUATION:
    beside_space = f"{mark} " in text or f" {mark}" in text
    out = out.replace(mark, "" if joined or beside_space else " ")
  return _FULL_STOP.sub("", out, count=_MOST_STOPS)


def _words(text: str) -> str:
  words = [NUMBERS.get(x, x) for x in text.lower().split()]
  return " ".join(CONTRACTIONS.get(x, x) for x in words if x not in _ARTICLES)


def vqa_normalize(text: str) -> str:
  """Returns the form in which VQA v2 compares answers."""
  text = text.replace("\n", " ").replace("\t", " ").strip()
  return _words(_strip_punctuation(text))


def evalai_normalize(text: str) -> str:
  """Returns the form in which TextVQA compares answers.

  Commas and question marks go first, and "'s" becomes a word of its own.
  """
  text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
  return vqa_normalize(text.strip())
