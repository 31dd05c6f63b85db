"""Finds separators in text that comes token by token.

A separator may be a part of a token (`.\\n\\n`), a token, or several tokens
(`\\n` and `\\n`). An automaton over tokens, made once from the bytes of a
vocabulary, finds it in all of these cases by one look-up a token.
"""

from collections.abc import Sequence

import numpy as np

from research.text.tokenizer import Tokenizer
from research.typing import UserError


def separator_automaton(
  tokens: Sequence[bytes], separator: bytes
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the automaton of Knuth, Morris and Pratt (1977) over tokens.

  A state is the length of the longest end of the text that begins the
  separator. After a separator, the next one begins with new text.

  Args:
    tokens: the text of each of V tokens; empty for those without.
    separator: at least one byte.

  Returns:
    int32 `[S, V]`, the state after each token in each of S states, from 0, that
    of a new text; and bool `[S, V]`, whether the token completes a separator.

  Raises:
    UserError: the separator is empty.
  """
  if not separator:
    raise UserError("separator: found no text, expected at least one character")
  size = len(separator)
  table = _byte_table(separator)
  following = np.zeros((size, len(tokens)), np.int32)
  ends = np.zeros((size, len(tokens)), bool)
  for state in range(size):
    for token, text in enumerate(tokens):
      now, found = state, False
      for byte in text:
        now = table[now][byte]
        if now == size:
          now, found = 0, True
      following[state, token], ends[state, token] = now, found
  return following, ends


def token_texts(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
  """Returns the text of each token, empty for special and unknown ones.

  Args:
    tokenizer: any; a token that is a part of a character has the text that its
      decoder gives it alone, in which no separator of whole characters is.
    vocab_size: number of tokens, of the model.
  """
  known = min(vocab_size, tokenizer.vocab_size)
  # Behind another token, since decoders drop the blank that begins a text.
  anchor = tokenizer.encode("a")[-1:]
  before = tokenizer.decode(anchor)
  both = tokenizer.backend.decode_batch(
    [[*anchor, i] for i in range(known)], skip_special_tokens=True
  )
  texts = [x.removeprefix(before).encode() for x in both]
  return texts + [b""] * (vocab_size - known)


def _byte_table(separator: bytes) -> list[list[int]]:
  """Returns the next state for each state and byte."""
  size = len(separator)
  table = [[0] * 256 for _ in range(size)]
  table[0][separator[0]] = 1
  fallback = 0
  for state in range(1, size):
    table[state] = list(table[fallback])
    table[state][separator[state]] = state + 1
    fallback = table[fallback][separator[state]]
  return table
