"""Tokens of generated tasks: one a word."""

import pytest

from research.errors import UserError
from research.reasoning.tasks import Chain, Countdown, chain, countdown
from research.reasoning.words import EOS, PAD, word_tokenizer


@pytest.mark.parametrize(
  ("task", "words", "length"),
  [
    (Countdown(count=10), countdown.vocabulary(), 7 + 8 + 7 + 6 + 1),
    (
      Chain(count=10, terms=(4, 4), totals=(0, 199)),
      chain.vocabulary(0, 199),
      8 + 3 * 6 + 1,
    ),
  ],
)
def test_a_token_is_a_word(task, words, length):
  tokenizer = word_tokenizer(words)
  assert tokenizer.vocab_size == len(words)
  for problem in task:
    text = f"{problem.prompt} {task.oracle(problem)}"
    ids = tokenizer.encode(f"{text} {EOS}")
    assert ids == [words.index(x) for x in f"{text} {EOS}".split()]
    assert len(ids) == length
    assert ids[-1:] == list(tokenizer.stop)
    assert tokenizer.decode(ids) == text
  with pytest.raises(Exception, match="UNK"):
    tokenizer.encode("3 + x")


def test_words_have_to_differ_and_to_end():
  with pytest.raises(UserError, match="found no <pad>"):
    word_tokenizer(["1", EOS])
  with pytest.raises(UserError, match="a word twice"):
    word_tokenizer(["1", "1", EOS, PAD])
