"""Bits per byte against code lengths counted by hand."""

import dataclasses
import math

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from research.data import bpe, pipeline, predicted
from research.data.sources import stdlib, synthetic
from research.text.tokenizer import Tokenizer

DOCUMENTS = stdlib.Stdlib("heldout", limit=4, size=3_000)
DATA = pipeline.Pipeline(source=DOCUMENTS, length=64, begin=0, end=0)


@pytest.fixture(scope="module")
def tokenizer():
  return bpe.Bpe(documents=DOCUMENTS, size=400).load()


@pytest.mark.parametrize("begin", [0, None])
@pytest.mark.parametrize("end", [0, None])
def test_tokens_are_the_weights_of_the_evaluation(tokenizer, begin, end):
  data = dataclasses.replace(DATA, begin=begin, end=end)
  found = predicted.count_predicted(data, tokenizer)
  batches = data.evaluation(tokenizer)
  assert found.tokens == sum(b["weights"].sum() for b in batches)
  targets = np.concatenate(
    [b["targets"][b["weights"] > 0] for b in batches]
  ).tolist()
  # What the targets spell, byte by byte; no text has a character cut in two.
  spelled = [tokenizer.decode([i]) for i in targets if i != 0]
  assert found.size == sum(len(text.encode()) for text in spelled)


@pytest.mark.parametrize("text", ["ab ab", "ab  ab aba", "\u00e9 ab"])
def test_a_blank_after_the_first_word_is_predicted(text):
  """Also where a word begins with its blank, which a decoder drops alone."""
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.Metaspace()
  backend.decoder = decoders.Metaspace()
  trainer = trainers.BpeTrainer(vocab_size=64, show_progress=False)
  backend.train_from_iterator(["ab aba \u00e9"] * 9, trainer)
  words = Tokenizer(backend=backend, bos=None, eos=None, pad=0, stop=())
  data = dataclasses.replace(DATA, source=[text], begin=None, end=None)
  found = predicted.count_predicted(data, words)
  first = text.split(" ")[0]
  assert len(words.encode(first)) == 1
  assert found.size == len(text.encode()) - len(first.encode())


def test_a_uniform_model_over_bytes_needs_eight_bits():
  class Bytes:
    def encode(self, text):
      return list(text.encode())

  of = predicted.count_predicted(dataclasses.replace(DATA, end=None), Bytes())
  assert of.size == of.tokens
  found = predicted.bits_per_byte(math.log(256), of.tokens, of)
  assert found == pytest.approx(8, rel=1e-12)


def test_only_where_everything_was_measured(tokenizer):
  of = predicted.count_predicted(DATA, tokenizer)
  assert predicted.bits_per_byte(1.0, of.tokens - 1, of) is None
  assert predicted.bits_per_byte(1.0, 5, None) is None


def test_data_without_text():
  markov = synthetic.Markov(vocab=8, length=16, split="train")
  data = pipeline.Pipeline(source=markov)
  assert predicted.count_predicted(data, None) is None
