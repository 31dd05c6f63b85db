"""Batches of preference pairs, with chosen and rejected on an axis of two.

Keys are those of text rows, with shape [2, T] per pair (so [B, 2, T] per
batch): index 0 is the chosen answer, index 1 the rejected one. Pairs are not
packed together. Weights are 1 on the tokens of the answers.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import grain
import numpy as np

from research.data import pipeline
from research.data.packing import PackedRows, Piece, Row
from research.data.sources import NoExamples
from research.data.sources.records import Pair
from research.ranges import AtLeast, NonNegativeInt, PositiveInt, Ranged
from research.typing import UserError


@runtime_checkable
class PairSource(Protocol):
  """A source of preference pairs, e.g. `records.Preferences`."""

  def pairs(self, tokenizer: Any) -> Sequence[Pair]: ...


@dataclasses.dataclass(frozen=True)
class PairedRows:
  """A random-access sequence of pairs of rows.

  Attributes:
    rows: chosen and rejected rows, alternating.
  """

  rows: PackedRows

  def __len__(self) -> int:
    return len(self.rows) // 2

  def __getitem__(self, index: int) -> Row:
    both = self.rows[2 * index], self.rows[2 * index + 1]
    return {k: np.stack([row[k] for row in both]) for k in both[0]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs(Ranged):
  """Preference pairs as shuffled batches; see `pipeline.Pipeline`.

  Attributes:
    source: the source of the pairs.
    length: row length T.
    batch_size: pairs in a batch over all processes, B.
    seed: of the shuffle.
    longer: whether pairs longer than a row are an error or dropped. They are
      never truncated, since a preference refers to whole answers.
  """

  source: PairSource
  length: AtLeast(2) = 256
  batch_size: PositiveInt = 4
  seed: NonNegativeInt = 0
  longer: Literal["error", "drop"] = "error"

  def rows(self, tokenizer: Any) -> PairedRows:
    pairs = self.source.pairs(tokenizer)
    sizes = [max(len(e.tokens) for e in pair) for pair in pairs]
    fitting = [i for i, size in enumerate(sizes) if size <= self.length]
    dropped = len(pairs) - len(fitting)
    if self.longer == "error" and dropped or not fitting:
      longest = int(np.argmax(sizes))
      raise (UserError if self.longer == "error" else NoExamples)(
        f"Pairs.length: {dropped} of {len(pairs)} pairs do"
        f" not fit into {self.length} positions; pair {longest} has"
        f" {sizes[longest]} tokens.\n"
        f"Set length={sizes[longest]}, or longer='drop'."
      )
    if dropped:
      warnings.warn(
        f"Pairs.length: {dropped:,} of {len(pairs):,} pairs are longer than "
        f"{self.length} positions, the longest has {max(sizes)}. They are "
        "dropped.",
        RuntimeWarning,
        stacklevel=2,
      )
    found = [example for i in fitting for example in pairs[i]]
    plan = [[Piece(i, 0, len(e.tokens))] for i, e in enumerate(found)]
    return PairedRows(
      PackedRows(
        [e.tokens for e in found],
        plan,
        self.length,
        [e.loss_mask for e in found],
      )
    )

  def stream(self, tokenizer: Any) -> grain.MapDataset:
    return pipeline.shuffled(self.rows(tokenizer), self.seed)

  def training(
    self, tokenizer: Any, process: int = 0, processes: int = 1
  ) -> grain.IterDataset:
    stream = self.stream(tokenizer)
    return pipeline.share(stream, self.batch_size, process, processes)

  def evaluation(self, tokenizer: Any, limit: int | None = None) -> list[Row]:
    return pipeline.in_order(self.rows(tokenizer), self.batch_size, limit)
