"""Data pipeline: tokenise, pack, shuffle globally, shard by process, batch.

The order of examples depends on the seed and the example's index only. The
global shuffle comes before sharding by process, so the batch of step k is the
same, row by row, for any number of processes, and the iterator's state is a
single number. A mixture selects its parts by index arithmetic, so the same
holds for it.
"""

import collections
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import grain
import numpy as np

from research.data import examples, packing
from research.data.packing import PackedRows, Row, Rows
from research.ranges import AtLeast, NonNegativeInt, PositiveInt, Ranged, Real
from research.text import special_tokens
from research.text.special_tokens import SpecialTokens
from research.typing import UserError

ENDLESS = 2**50
"""Length of an "endless" stream: more than any run reads, exact as a float."""

RowTransform = Callable[[Row, np.random.Generator], Row]
"""A random transform of one row; the generator depends on seed and index."""


@runtime_checkable
class Data(Protocol):
  """The data of an experiment; `tokenizer` has `encode(text)` or is None."""

  batch_size: int

  def rows(self, tokenizer: Any) -> Rows:
    """Returns the rows in the source's order."""

  def stream(self, tokenizer: Any) -> grain.MapDataset:
    """Returns the endless shuffled rows of all processes."""

  def training(
    self, tokenizer: Any, process: int = 0, processes: int = 1
  ) -> grain.IterDataset:
    """Returns endless shuffled batches; `iter()` of it can be checkpointed."""

  def evaluation(self, tokenizer: Any, limit: int | None = None) -> list[Row]:
    """Returns all rows once, in order, in at most `limit` equal batches."""


class ShuffledRows:
  """Base of data whose rows are shuffled and batched.

  Subclasses define `rows`, and have fields `batch_size` and `seed`.
  """

  transforms: tuple[RowTransform, ...] = ()
  """Random transforms of a row, in order; training only."""

  def rows(self, tokenizer: Any) -> Rows:
    raise NotImplementedError

  def stream(self, tokenizer: Any) -> grain.MapDataset:
    return shuffled(self.rows(tokenizer), self.seed, self.transforms)

  def training(
    self, tokenizer: Any, process: int = 0, processes: int = 1
  ) -> grain.IterDataset:
    return share(self.stream(tokenizer), self.batch_size, process, processes)

  def evaluation(self, tokenizer: Any, limit: int | None = None) -> list[Row]:
    return in_order(self.rows(tokenizer), self.batch_size, limit)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline(Ranged, ShuffledRows):
  """A data source, packed into rows and shuffled.

  Attributes:
    source: documents, or tokenised examples (`research.data.examples`).
    length: row length T.
    batch_size: rows in a batch over all processes, B.
    seed: of the shuffle and of the transforms' generators.
    plan: packing plan: `packing.concatenate`, `best_fit` or `one_per_row`.
    begin: token before each text document, so that its first token is predicted
      too; None for none, "auto" for the tokenizer's default.
    end: token after each text document; values as for `begin`.
    every_row: whether rows that continue a document repeat its `begin` token,
      excluded from the loss. "auto": the tokenizer's default if `begin` is
      "auto", else False.
    transforms: random transforms of a row, in order; training only.
  """

  source: examples.Source
  length: AtLeast(2) = 256
  batch_size: PositiveInt = 4
  seed: NonNegativeInt = 0
  plan: packing.Plan = packing.concatenate
  begin: int | Literal["auto"] | None = "auto"
  end: int | Literal["auto"] | None = "auto"
  every_row: bool | Literal["auto"] = "auto"
  transforms: tuple[RowTransform, ...] = ()

  def special_tokens(self, tokenizer: Any) -> SpecialTokens:
    """Returns the special tokens around documents and rows."""
    own = special_tokens.from_tokenizer(tokenizer)
    auto = self.begin == "auto" and own.every_row
    return SpecialTokens(
      own.begin if self.begin == "auto" else _ids(self.begin),
      own.end if self.end == "auto" else _ids(self.end),
      auto if self.every_row == "auto" else self.every_row,
    )

  def rows(self, tokenizer: Any) -> PackedRows:
    """Returns the packed rows that have targets, in the source's order.

    Warns if examples with a partial loss mask, such as conversations, are
    split: an answer then loses its question, while plain text may be read from
    anywhere.

    Raises:
      UserError: the source is of tokens, and `begin` or `end` names one, which
        only texts get; or a row is too short.
    """
    if isinstance(self.source, examples.Tokens):
      self._check_special_tokens()
    special = self.special_tokens(tokenizer)
    found = examples.read(self.source, tokenizer, special)
    packed = packing.pack(
      [e.tokens for e in found],
      self.length,
      self.plan,
      [e.loss_mask for e in found],
      special.row_begin,
    )
    rows = packed.with_targets()
    self._warn(found, packed, len(rows))
    return rows

  def _check_special_tokens(self) -> None:
    """Raises UserError for special tokens that examples do not get."""
    given = {"end": self.end}
    if self.every_row is not True:
      given["begin"] = self.begin
    for name, token in given.items():
      if isinstance(token, int):
        raise UserError(
          f"Pipeline.{name}: found {token} for {type(self.source).__name__},"
          " whose examples are tokens already and get no other.\nExpected"
          ' "auto" or None; put it into the examples, or give texts.'
        )

  def _warn(
    self,
    found: Sequence[examples.Example],
    packed: packing.PackedRows,
    kept: int,
  ) -> None:
    masked = [i for i, e in enumerate(found) if not e.loss_mask.all()]
    if not masked:
      return
    pieces = collections.Counter(
      piece.document for row in packed.plan for piece in row
    )
    split = [i for i in masked if pieces[i] > 1]
    if not split:
      return
    sizes = [len(found[i].tokens) for i in split]
    longer = sum(size > self.length for size in sizes)
    without = ""
    if kept < len(packed):
      without = (
        f"; {len(packed) - kept:,} of {len(packed):,} rows have no targets and "
        "are dropped"
      )
    what, hint = [], ""
    if longer:
      what.append(
        f"{longer:,} of {len(found):,} examples are longer than {self.length}"
        f" positions, the longest has {max(sizes)}"
      )
    if others := len(split) - longer:
      what.append(f"{others:,} of {len(found):,} reach over a row's end")
      hint = " plan=packing.best_fit splits none that fits into a row."
    warnings.warn(
      f"Pipeline.length: {'; '.join(what)}. They are split, and each part is "
      f"trained on without the preceding ones{without}.{hint}",
      RuntimeWarning,
      stacklevel=3,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(Ranged, ShuffledRows):
  """A mixture of several data sets in fixed proportions.

  Any prefix of the stream has the right proportions, to within a few rows. Each
  part is shuffled and repeated independently.

  Attributes:
    parts: the data sets; their own batch sizes are ignored.
    weights: proportions of rows (not of documents or target tokens), not
      necessarily normalised.
    batch_size: rows in a batch over all processes, B.
  """

  parts: tuple[Data, ...]
  weights: tuple[Real(above=0, why="remove a part that is not used"), ...]
  batch_size: PositiveInt = 4

  def __post_init__(self):
    super().__post_init__()
    if not self.parts or len(self.parts) != len(self.weights):
      raise UserError(
        f"Mixture: found {len(self.parts)} parts and {len(self.weights)}"
        " weights, expected as many of both, at least one."
      )
    if max(self.weights) > 10_000 * min(self.weights):
      raise UserError(
        f"Mixture.weights: found {self.weights}, expected no ratio above"
        " 10,000; such a part would hardly ever be sampled."
      )

  def rows(self, tokenizer: Any) -> list[Row]:
    """Returns the rows of all parts, each spread evenly over the whole.

    So a limited evaluation has of each part as much as it is of all rows.
    """
    parts = [part.rows(tokenizer) for part in self.parts]
    _check_equal_shapes(parts)
    places = [
      ((i + 0.5) / len(rows), part, i)
      for part, rows in enumerate(parts)
      for i in range(len(rows))
    ]
    return [parts[part][i] for _, part, i in sorted(places)]

  def stream(self, tokenizer: Any) -> grain.MapDataset:
    streams = [part.stream(tokenizer) for part in self.parts]
    _check_equal_shapes(streams)
    return grain.MapDataset.mix(streams, self.weights)


def _ids(token: int | None) -> tuple[int, ...]:
  return () if token is None else (token,)


def shuffled(
  rows: Rows,
  seed: int,
  transforms: Sequence[RowTransform] = (),
) -> grain.MapDataset:
  """Returns an endless stream of the rows, reshuffled every epoch."""
  # Grain's own endlessness, sys.maxsize, overflows in batches of one.
  epochs = ENDLESS // max(len(rows), 1)
  data = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(epochs)
  for transform in transforms:
    data = data.random_map(transform)
  return data


def share(
  stream: grain.MapDataset, batch_size: int, process: int, processes: int
) -> grain.IterDataset:
  """Returns this process's share of the endless batches.

  Args:
    stream: the rows of all processes.
    batch_size: rows in a batch over all processes.
    processes: number of processes; must divide the batch.

  Raises:
    UserError: the batch does not divide among the processes.
  """
  # One thread: building a row is cheap, and XLA needs the cores.
  return prefetched(batches(stream, batch_size, process, processes))


def batches(
  stream: grain.MapDataset,
  batch_size: int,
  process: int,
  processes: int,
  join: Callable[[Sequence[Row]], Row] | None = None,
) -> grain.MapDataset:
  """Returns this process's share of the batches, by index.

  Args:
    stream, batch_size, process, processes: as for `share`.
    join: makes a batch of rows; by default it stacks their arrays.
  """
  if batch_size % processes:
    raise UserError(
      f"Pipeline.batch_size: found {batch_size}, expected a multiple"
      f" of the {processes} processes."
    )
  size = batch_size // processes
  if processes > 1:
    stream = _Part(stream, size, process, processes)
  return stream.batch(size, batch_fn=join)


def prefetched(data: grain.MapDataset, threads: int = 1) -> grain.IterDataset:
  """Returns an iterable whose elements threads make ahead of time."""
  ahead = max(4, threads)
  return data.to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
  )


class _Part(grain.MapDataset):
  """Rows `[i * size, (i + 1) * size)` of each `parts * size` of a dataset."""

  def __init__(self, parent: grain.MapDataset, size: int, i: int, parts: int):
    super().__init__(parent)
    self._rows, self._size, self._i, self._parts = parent, size, i, parts

  def __len__(self) -> int:
    return len(self._rows) // (self._size * self._parts) * self._size

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    batch, row = divmod(index, self._size)
    first = (batch * self._parts + self._i) * self._size
    return self._rows[first + row]


def in_order(
  rows: Rows, batch_size: int, limit: int | None = None
) -> list[Row]:
  """Returns all rows in at most `limit` equal batches, the last one padded."""
  count = len(rows) if limit is None else min(len(rows), limit * batch_size)
  full = [rows[i] for i in range(count)]
  if not full:
    return []
  full += [packing.padding_like(full[0])] * (-count % batch_size)
  return [
    {k: np.stack([row[k] for row in full[i : i + batch_size]]) for k in full[i]}
    for i in range(0, len(full), batch_size)
  ]


def _check_equal_shapes(parts: Sequence[Any]) -> None:
  shapes = [{k: v.shape for k, v in part[0].items()} for part in parts]
  for i, found in enumerate(shapes):
    if found != shapes[0]:
      raise UserError(
        f"Mixture.parts: rows of part {i} have shapes {found}, those of part 0"
        f" {shapes[0]}.\nExpected equal ones: give the parts equal lengths."
      )
