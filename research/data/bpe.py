"""Trains a byte-level BPE tokenizer on documents.

Sennrich et al. 2016 (arXiv:1508.07909) over bytes, with GPT-2's pre-tokenizer
(Radford et al. 2019, section 2.2), by the `tokenizers` library. Training is
deterministic.
"""

import dataclasses

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from research.data.sources import Documents
from research.text.tokenizer import Tokenizer
from research.typing import UserError

END = "<|endoftext|>"
"""Precedes and follows each document; its id is 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bpe:
  """A BPE tokenizer that `load` trains.

  Attributes:
    documents: training documents; use the training split only.
    size: vocabulary size, including the 256 bytes and special tokens.
    special: special tokens beside `END`, such as those around images.
    add_bos: whether documents and prompts begin with `END`.
  """

  documents: Documents
  size: int = 4096
  special: tuple[str, ...] = ()
  add_bos: bool = True

  def __post_init__(self):
    least = 257 + len(self.special)
    if self.size < least:
      raise UserError(
        f"Bpe.size: found {self.size}, expected at least {least}: the bytes,"
        f" {', '.join((END, *self.special[:3]))}"
        f"{' ...' if len(self.special) > 3 else ''}."
      )

  def load(self) -> Tokenizer:
    """Trains the tokenizer; short texts give fewer than `size` ids."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
      (self.documents[i] for i in range(len(self.documents))),
      trainers.BpeTrainer(
        vocab_size=self.size,
        special_tokens=[END, *self.special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
      ),
      length=len(self.documents),
    )
    return Tokenizer(
      backend=backend, bos=0, eos=0, pad=0, stop=(0,), add_bos=self.add_bos
    )
