"""BPE training: the textbook's merges, and lossless round trips."""

import collections
import re

import pytest

from research.data import bpe
from research.data.sources import stdlib
from research.text import gguf_vocab
from research.text.tokenizer import Tokenizer
from research.typing import UserError

DOCUMENTS = stdlib.Stdlib("validation", limit=6)


@pytest.fixture(scope="module")
def tokenizer():
  return bpe.Bpe(documents=DOCUMENTS, size=600).load()


class Texts(tuple):
  """Documents."""


def textbook(words: list[str], merges: int) -> list[tuple[str, str]]:
  """Sennrich et al. 2016, algorithm 1: merge the most frequent pair."""
  found, vocabulary = [], collections.Counter(tuple(w) for w in words)
  for _ in range(merges):
    pairs = collections.Counter()
    for word, count in vocabulary.items():
      for pair in zip(word, word[1:], strict=False):
        pairs[pair] += count
    best, count = pairs.most_common(1)[0]
    assert list(pairs.values()).count(count) == 1, "a tie"
    found.append(best)
    merged = collections.Counter()
    for word, n in vocabulary.items():
      joined = re.sub(
        r"(?<!\S)" + re.escape(" ".join(best)) + r"(?!\S)",
        "".join(best),
        " ".join(word),
      )
      merged[tuple(joined.split(" "))] += n
    vocabulary = merged
  return found


def test_merges_are_the_textbooks():
  words = ["lo"] * 20 + ["low"] * 9 + ["wide"] * 5 + ["den"] * 3
  want = textbook(words, 3)
  assert want == [("l", "o"), ("lo", "w"), ("d", "e")]
  learned = bpe.Bpe(documents=Texts(words), size=257 + 3).load()
  ids = [learned.encode("".join(pair)) for pair in want]
  assert ids == [[257 + i] for i in range(3)]


def test_every_text_comes_back(tokenizer):
  texts = [
    *gguf_vocab.PROBE_TEXTS,
    *(DOCUMENTS[i] for i in range(len(DOCUMENTS))),
  ]
  for text in texts:
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
  assert max(map(max, map(tokenizer.encode, texts[:3]))) < 600


def test_what_it_is(tokenizer):
  assert isinstance(tokenizer, Tokenizer)
  assert tokenizer.vocab_size == 600
  assert tokenizer.encode(bpe.END) == [0] == list(tokenizer.stop)
  assert tokenizer.encode("x", add_special=True)[0] == tokenizer.bos == 0
  assert tokenizer.decode([0, *tokenizer.encode("x")]) == "x"


def test_the_same_documents_give_the_same_vocabulary(tokenizer):
  again = bpe.Bpe(documents=DOCUMENTS, size=600).load()
  assert again.backend.to_str() == tokenizer.backend.to_str()


def test_gguf_has_a_name_for_its_words(tokenizer):
  keys, reason = gguf_vocab.from_tokenizer(tokenizer, 600)
  assert reason == ""
  assert keys["tokenizer.ggml.pre"] == "gpt-2"


def test_too_few_ids():
  with pytest.raises(UserError, match="at least 257"):
    bpe.Bpe(documents=DOCUMENTS, size=256)
