"""A tokenizer of words between spaces, for small models of generated tasks."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from research.errors import UserError

EOS = "<eos>"
PAD = "<pad>"


def word_tokenizer(words: Sequence[str]) -> Any:
  """Returns a `research.text` tokenizer whose ids are indices of words.

  Texts are words with one space between them, which `decode(encode(text))`
  gives back. Another word is an error, as the model has no token for it.

  Args:
    words: the vocabulary, `EOS` and `PAD` among them, such as
      `countdown.vocabulary()`.
  """
  import tokenizers

  from research.text.tokenizer import Tokenizer

  ids = {word: i for i, word in enumerate(words)}
  missing = [x for x in (EOS, PAD) if x not in ids]
  if missing or len(ids) != len(words):
    mistake = f"no {missing[0]}" if missing else "a word twice"
    raise UserError(
      f"word_tokenizer: found {mistake}, expected different words with {EOS}"
      f" and {PAD} among them."
    )
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  backend.add_special_tokens([EOS, PAD])
  return Tokenizer(
    backend=backend, eos=ids[EOS], pad=ids[PAD], stop=(ids[EOS],)
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordVocabulary:
  """The source of a tokenizer of words, for configurations.

  Attributes:
    words: as for `word_tokenizer`.
  """

  words: tuple[str, ...] = dataclasses.field(repr=False)

  def load(self) -> Any:
    return word_tokenizer(self.words)
