"""Sequence packing: packs tokenised documents into rows of a fixed length.

A *piece* is a contiguous part of a document. A plan assigns pieces to rows:
`concatenate` fills all rows and splits documents at row ends, `best_fit` splits
only documents longer than a row (Ding et al. 2024, "Fewer Truncations Improve
Language Modeling", best-fit packing), `one_per_row` never shares a row.

Invariants of all plans: each piece is a segment of its own, with positions from
0, so it cannot attend to its neighbours. Each token of a document but its first
is the target of exactly one position, even across a split. Its weight is 1 if
the loss mask covers it; the weight of all other positions (document ends,
padding) is 0. A piece that continues a document may repeat the document's
initial special tokens, with weight 0.

By hand, since what Grain (0.2.18) packs is a stream without an index to shuffle
and to resume by, documents longer than a row are refused there, and its best
fit takes them as they come: 231 rows, 249 with 16 open, where 225 do here
(`test_packing.py`).
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from research.data.sources import Documents, NoExamples
from research.text.special_tokens import (
  NO_SPECIAL_TOKENS,
  SpecialTokens,
  begins_with,
)
from research.typing import UserError

Row = dict[str, np.ndarray]
"""Keys tokens, targets, positions, segments (int32) and weights (float32)."""


@runtime_checkable
class Rows(Protocol):
  """A random-access sequence of rows."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Row: ...


class Piece(NamedTuple):
  """Tokens `start` to `start + size` of document number `document`."""

  document: int
  start: int
  size: int


Plan = Callable[[Sequence[int], int, Sequence[int]], list[list[Piece]]]
"""(document lengths, row length T, extra positions that a later piece of each
document takes for repeated special tokens) -> the pieces of each row."""


def tokenize(
  documents: Documents,
  encode: Callable[[str], Sequence[int]],
  special: SpecialTokens = NO_SPECIAL_TOKENS,
) -> list[np.ndarray]:
  """Returns the tokens of each document, int32 [length].

  Args:
    encode: text to token ids, without special tokens.
    special: special tokens around each document.

  Raises:
    NoExamples: no document has two tokens, so nothing can be predicted.
  """
  tokens = [
    np.asarray(special.document(encode(documents[i])), np.int32)
    for i in range(len(documents))
  ]
  tokens = [t for t in tokens if len(t) > 1]
  if not tokens:
    raise NoExamples(
      f"{documents}: {len(documents)} documents, none with two tokens.\n"
      "Expected text to learn from; check the source's paths or split."
    )
  return tokens


def concatenate(
  lengths: Sequence[int], row: int, overhead: Sequence[int] | None = None
) -> list[list[Piece]]:
  """Returns a plan that fills all rows but the last, splitting at row ends."""
  rows: list[list[Piece]] = [[]]
  space = row
  for document, (length, head) in enumerate(_with_heads(lengths, overhead)):
    start = 0
    while start < length:
      if space == 0:
        rows.append([])
        space = row
      space -= head if start else 0
      size = min(space, length - start)
      rows[-1].append(Piece(document, start, size))
      start, space = start + size, space - size
  return rows


def one_per_row(
  lengths: Sequence[int], row: int, overhead: Sequence[int] | None = None
) -> list[list[Piece]]:
  """Returns a plan in which no documents share a row; long ones are split."""
  return [
    [Piece(document, start, min(row - head * (start > 0), length - start))]
    for document, (length, head) in enumerate(_with_heads(lengths, overhead))
    for start in (*range(min(length, 1)), *range(row, length, row - head))
  ]


def best_fit(
  lengths: Sequence[int], row: int, overhead: Sequence[int] | None = None
) -> list[list[Piece]]:
  """Returns a best-fit plan: no document that fits into a row is split."""
  heads = [head for _, head in _with_heads(lengths, overhead)]
  pieces = [piece for (piece,) in one_per_row(lengths, row, overhead)]
  rows: list[list[Piece]] = []
  spaces: list[tuple[int, int]] = []  # sorted (free positions, row number)

  def places(piece: Piece) -> int:
    return piece.size + heads[piece.document] * (piece.start > 0)

  for piece in sorted(pieces, key=lambda p: (-places(p), p)):
    found = bisect.bisect_left(spaces, (places(piece), -1))
    if found == len(spaces):
      rows.append([])
      space, number = row, len(rows) - 1
    else:
      space, number = spaces.pop(found)
    rows[number].append(piece)
    bisect.insort(spaces, (space - places(piece), number))
  return rows


def _with_heads(
  lengths: Sequence[int], overhead: Sequence[int] | None
) -> list[tuple[int, int]]:
  heads = [0] * len(lengths) if overhead is None else overhead
  return list(zip(lengths, heads, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
  """A random-access sequence of packed rows, built on access.

  Attributes:
    documents: tokens of each document, int32 [length].
    plan: the pieces of each row.
    length: row length T.
    loss_mask: which tokens of each document are targets, bool [length]; None
      for all.
    begin: special tokens; all pieces of documents that begin with them do.
  """

  documents: Sequence[np.ndarray]
  plan: Sequence[Sequence[Piece]]
  length: int
  loss_mask: Sequence[np.ndarray] | None = None
  begin: tuple[int, ...] = ()

  def __len__(self) -> int:
    return len(self.plan)

  def __getitem__(self, index: int) -> Row:
    row = padding_row(self.length)
    place = 0
    for segment, piece in enumerate(self.plan[index]):
      document = self.documents[piece.document]
      # If the document was split within `begin`, repeat only the first part.
      head = self.begin[: piece.start] if self._begins(document) else ()
      tokens = document[piece.start :]
      targets = tokens[1 : piece.size + 1]  # one fewer at the document's end
      first = place + len(head)
      stop = first + piece.size
      learn = slice(first, first + len(targets))
      row["tokens"][place:first] = head
      row["tokens"][first:stop] = tokens[: piece.size]
      row["targets"][learn] = targets
      row["weights"][learn] = self._weights(piece, len(targets))
      row["positions"][place:stop] = np.arange(stop - place)
      row["segments"][place:stop] = segment
      place = stop
    return row

  def with_targets(self) -> "PackedRows":
    """Returns only the rows that have a target."""
    plan = [row for row in self.plan if any(map(self._has_target, row))]
    return dataclasses.replace(self, plan=plan)

  def _has_target(self, piece: Piece) -> bool:
    stop = min(
      piece.start + piece.size, len(self.documents[piece.document]) - 1
    )
    count = stop - piece.start
    return count > 0 and bool(np.any(self._weights(piece, count)))

  def _begins(self, document: np.ndarray) -> bool:
    return begins_with(document, self.begin)

  def _weights(self, piece: Piece, count: int):
    if self.loss_mask is None:
      return 1
    first = piece.start + 1
    return self.loss_mask[piece.document][first : first + count]


def padding_row(length: int) -> Row:
  """Returns a row of padding: weight 0, position and segment -1."""
  return {
    "tokens": np.zeros(length, np.int32),
    "targets": np.zeros(length, np.int32),
    "weights": np.zeros(length, np.float32),
    "positions": np.full(length, -1, np.int32),
    "segments": np.full(length, -1, np.int32),
  }


def padding_like(row: Row) -> Row:
  """Returns a padding row with the keys and shapes of `row`."""
  marks = ("positions", "segments")
  return {k: np.full_like(v, -(k in marks)) for k, v in row.items()}


def pack(
  documents: Sequence[np.ndarray],
  length: int,
  plan: Plan = concatenate,
  loss_mask: Sequence[np.ndarray] | None = None,
  begin: tuple[int, ...] = (),
) -> PackedRows:
  """Packs documents into rows of `length` positions.

  Args:
    documents: tokens of each document, int32 [length].
    plan: how documents share rows.
    loss_mask: see `PackedRows`.
    begin: special tokens to repeat at the start of each later piece of a
      document that begins with them.

  Raises:
    UserError: `length` is too short.
  """
  least = 2 + len(begin)
  if length < least:
    raise UserError(
      f"length: found {length}, expected at least {least} positions in a row."
    )
  sizes = [len(d) for d in documents]
  overhead = [len(begin) * begins_with(d, begin) for d in documents]
  return PackedRows(
    documents, plan(sizes, length, overhead), length, loss_mask, begin
  )
