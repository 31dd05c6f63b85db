"""A cheap tokenizer and text, for tests of tiny models."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Letters:
  """A tokenizer of 64 ids."""

  vocab_size: int = 64

  def load(self):
    return self

  def encode(self, text):
    return [ord(c) % 64 for c in text]


@dataclasses.dataclass(frozen=True)
class Text:
  """Documents of random letters."""

  documents: int
  letters: int

  def __len__(self):
    return self.documents

  def __getitem__(self, index):
    rng = np.random.default_rng(index)
    return "".join(map(chr, rng.integers(32, 96, self.letters)))
