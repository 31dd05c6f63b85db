"""The last-word prediction task."""

import pytest

from research.data.sources import PydocTopics
from research.data.sources.last_words import Item, LastWords
from research.typing import UserError

TEXT = """Heading
*******

A decorator returns another function.  It is applied to a function.  Nobody
knows the answer.

   code = ["It is no function."]

An answer that comes after a program has forgotten the function.  This one
has a function.
"""


def test_an_answer_is_long_last_and_was_said():
  found = LastWords(source=(TEXT,)).items()
  assert found == [
    Item(
      "A decorator returns another function. It is applied to a", " function"
    ),
    Item(
      "An answer that comes after a program has forgotten the function. This"
      " one has a",
      " function",
    ),
  ]
  assert not any("code" in x.context or "Heading" in x.context for x in found)


def test_words_and_letters_bound_what_is_kept():
  # `function` is further away than four words, and longer than eight letters.
  with pytest.raises(UserError, match="no sentence"):
    LastWords(source=(TEXT,), words=4).items()
  with pytest.raises(UserError, match="no sentence"):
    LastWords(source=(TEXT,), letters=9).items()
  with pytest.raises(UserError, match="LastWords.words: found 1"):
    LastWords(source=(TEXT,), words=1)


def test_a_limit_is_spread_over_what_there_is():
  whole = LastWords(source=PydocTopics("train"))
  items = whole.items()
  assert len(items) > 100
  for context, answer in items:
    assert answer.startswith(" ") and answer.strip().lower() in context.lower()
    assert len(context.split(" ")) <= whole.words
  some = LastWords(source=whole.source, limit=10).items()
  assert some == [items[k * len(items) // 10] for k in range(10)]
