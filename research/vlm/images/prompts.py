"""What stands for an image in a prompt: soft tokens, and tokens around them.

A layout makes `Piece`s of a plan. The prompt's text, the length of a sequence
and the places of features all come from these pieces, so that they cannot
disagree.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Literal

from research.vlm.images.plan import Plan

MARK = "<image>"
"""Where an image stands in a text that somebody writes."""


@dataclasses.dataclass(frozen=True)
class Soft:
  """Placeholders that features take the place of, `count` in a row."""

  count: int


@dataclasses.dataclass(frozen=True)
class Token:
  """One token of the model's vocabulary, by its text."""

  text: str


@dataclasses.dataclass(frozen=True)
class Text:
  """Text of as many tokens as the tokenizer makes of it."""

  text: str


Piece = Soft | Token | Text

Layout = Callable[[Plan], tuple[Piece, ...]]


@dataclasses.dataclass(frozen=True)
class PromptFormat:
  """What a prompt has beside its images and its text.

  A conversation that a chat template rendered is such a text.

  Attributes:
    begin: where the tokens stand that begin a document, if the tokenizer has
      any (often a `bos`): first, unless the text begins with them, or behind
      the last image, where a `bos` stands in any case; a prompt without images
      begins with them. "always" is first, and the tokenizer's `bos`, or its
      `eos`, if it begins documents with none.
    end: text behind the prompt's own, of which it is a part to the tokenizer.
  """

  begin: Literal["first", "after_images", "always"] = "first"
  end: str = ""


def text_of(pieces: Iterable[Piece], placeholder: str) -> str:
  """Returns the text that a tokenizer reads."""
  return "".join(
    placeholder * piece.count if isinstance(piece, Soft) else piece.text
    for piece in pieces
  )


def token_count(
  pieces: Iterable[Piece], count_text: Callable[[str], int] | None = None
) -> int:
  """Returns how many positions the pieces take.

  Args:
    count_text: a tokenizer's count for `Text`; by default texts count nothing.
  """
  total = 0
  for piece in pieces:
    if isinstance(piece, Soft):
      total += piece.count
    elif isinstance(piece, Token):
      total += 1
    elif count_text is not None:
      total += count_text(piece.text)
  return total


@dataclasses.dataclass(frozen=True)
class Wrapped:
  """All of an image's features in a row, between some tokens."""

  before: tuple[str, ...] = ()
  after: tuple[str, ...] = ()

  def __call__(self, plan: Plan) -> tuple[Piece, ...]:
    soft = Soft(plan.soft_tokens)
    return (*map(Token, self.before), soft, *map(Token, self.after))


@dataclasses.dataclass(frozen=True)
class RowsAndColumns:
  """Idefics3's and SmolVLM's: a tag with row and column before each tile.

  One token per tag, not seven pieces of it, is what SmolVLM needs
  (arXiv:2504.05299, section 3.1).

  Attributes:
    fence: the token before each view, and behind the last one.
    whole: the tag of the whole view.
    tile: the tag of a tile.
  """

  fence: str = "<fake_token_around_image>"
  whole: str = "<global-img>"
  tile: str = "<row_{row}_col_{column}>"

  def __call__(self, plan: Plan) -> tuple[Piece, ...]:
    fence = Token(self.fence)
    counts = iter(rows * columns for rows, columns in plan.grids)
    pieces = []
    for row in range(1, plan.rows + 1):
      for column in range(1, plan.columns + 1):
        tag = Token(self.tile.format(row=row, column=column))
        pieces += [fence, tag, Soft(next(counts))]
      # Two newlines behind the last row are one token of published models.
      pieces.append(Token("\n" if row < plan.rows else "\n\n"))
    return (*pieces, fence, Token(self.whole), Soft(next(counts)), fence)


@dataclasses.dataclass(frozen=True)
class WholeThenTiles:
  """nanoVLM's: a tag before the whole view and before each tile, no more."""

  whole: str = "<|global_image|>"
  tile: str = "<row_{row}_col_{column}>"

  def __call__(self, plan: Plan) -> tuple[Piece, ...]:
    tags = [self.whole]
    tags += [
      self.tile.format(row=row, column=column)
      for row in range(1, plan.rows + 1)
      for column in range(1, plan.columns + 1)
    ]
    pieces = []
    for tag, (rows, columns) in zip(tags, plan.grids, strict=True):
      pieces += [Token(tag), Soft(rows * columns)]
    return tuple(pieces)


@dataclasses.dataclass(frozen=True)
class WholeAndCrops:
  """Gemma 3's: each view wrapped; crops are introduced by words."""

  before: tuple[str, ...] = ("\n\n", "<start_of_image>")
  after: tuple[str, ...] = ("<end_of_image>", "\n\n")

  def __call__(self, plan: Plan) -> tuple[Piece, ...]:
    views = [
      (*map(Token, self.before), Soft(rows * columns), *map(Token, self.after))
      for rows, columns in plan.grids
    ]
    if len(views) == 1:
      return views[0]
    pieces = [Text("Here is the original image "), *views[0]]
    pieces += [Text(" and here are some crops to help you see better ")]
    for number, view in enumerate(views[1:]):
      pieces += [Text(" ")] if number else []
      pieces += view
    return tuple(pieces)


@dataclasses.dataclass(frozen=True)
class RowEnds:
  """Molmo's: each map of features between two tokens, a token ends each row.

  Attributes:
    whole: starts the whole view.
    tiles: starts the map of all tiles.
    row: ends a row.
    end: ends a map.
  """

  whole: str = "<im_start>"
  tiles: str = "<im_start>"
  row: str = "<im_col>"
  end: str = "<im_end>"

  def __call__(self, plan: Plan) -> tuple[Piece, ...]:
    pieces = []
    starts = self.whole, self.tiles
    for start, (rows, columns) in zip(starts, plan.grids, strict=True):
      pieces += [Token(start), *(Soft(columns), Token(self.row)) * rows]
      pieces += [Token(self.end)]
    return tuple(pieces)
