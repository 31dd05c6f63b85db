"""Small tokenizers in the manner of SentencePiece."""

from collections.abc import Sequence

import tokenizers
from tokenizers import models, normalizers

BLANK = "\u2581"


def byte_fallback(
  words: Sequence[str], merges: Sequence[tuple[str, str]] = ()
) -> tokenizers.Tokenizer:
  """Returns a tokenizer of `<unk>`, bytes, and then these words."""
  every = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *words]
  return tokenizers.Tokenizer(
    models.BPE(
      vocab={word: i for i, word in enumerate(every)},
      merges=list(merges),
      unk_token="<unk>",
      byte_fallback=True,
    )
  )


def put_blank_before(backend: tokenizers.Tokenizer) -> None:
  """Has a tokenizer put a blank before each text, as Llama 2's does."""
  backend.normalizer = normalizers.Sequence(
    [normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)]
  )
