"""Questions about images as rows that a vision language model learns from.

A row is one sample: the placeholders of its images, the question, and the
answer, which alone is in the loss. A row's images are drawn or read, and cut
into views, when the row is.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from research.data import packing, pipeline
from research.data.examples import Example
from research.data.packing import Row
from research.data.sources import Documents
from research.typing import UInt8, UserError
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.prompts import Piece, Soft, Text
from research.vlm.scenes.sample import Sample
from research.vlm.scenes.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
  """The text of a sample, around its images.

  Attributes:
    question: around the question, which comes after the images.
    answer: around the answer.
    end: whether the tokenizer's end token follows, which is learned as well.
  """

  question: str = "{question}"
  answer: str = " {answer}"
  end: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts(Documents):
  """The texts of samples, without their images: what a tokenizer learns from.

  Attributes:
    samples: questions about images.
    template: the text around images.
  """

  samples: Task
  template: Template = Template()

  def __len__(self) -> int:
    return len(self.samples)

  def __getitem__(self, index: int) -> str:
    sample = self.samples.drawn(index)
    question = self.template.question.format(question=sample.question)
    return question + self.template.answer.format(answer=sample.answer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageQuestions(pipeline.ShuffledRows):
  """Samples as rows of tokens and views; a `research.data.pipeline.Data`.

  Attributes:
    samples: questions about images.
    preprocessor: how an image becomes views, and what stands for it.
    image_token: id of the placeholder.
    length: tokens of a row, T.
    views: views of a row, V; a sample with more of them is refused.
    template: the text around images.
    batch_size: rows in a batch over all processes.
    seed: of the shuffle.
  """

  samples: Sequence[Sample]
  preprocessor: Preprocessor
  image_token: int
  length: int
  views: int = 1
  template: Template = Template()
  batch_size: int = 8
  seed: int = 0

  def __post_init__(self):
    pipeline.check_sizes(self, length=2, views=1, batch_size=1)

  def rows(self, tokenizer: Any) -> "ImageRows":
    """Returns the rows in the samples' order."""
    return ImageRows(self, tokenizer)


@dataclasses.dataclass(frozen=True)
class ImageRows(Sequence[Row]):
  """Rows of an `ImageQuestions`, made when they are read.

  Beside the keys of text, a row has `pixels`, uint8 [V, H, W, 3]; where it has
  fewer views, the rest are zeros.
  """

  data: ImageQuestions
  tokenizer: Any

  def __len__(self) -> int:
    return len(self.data.samples)

  def __getitem__(self, index: Any) -> Row:
    data, sample = self.data, self.data.samples[index]
    prompt = Prompt.from_images(sample.images, data.preprocessor, data.views)
    example = tokens_of(
      sample, prompt, self.tokenizer, data.image_token, data.template
    )
    if len(example.tokens) > data.length:
      raise UserError(
        f"ImageQuestions.length: found {data.length}, expected at least"
        f" {len(example.tokens)}: {len(sample.images)} images with"
        f" {prompt.soft_tokens} soft tokens, and the text of"
        f" {sample.question!r}"
      )
    return text_row(example, data.length) | {"pixels": prompt.pixels}


@dataclasses.dataclass(frozen=True)
class Prompt:
  """Images on their way into a prompt.

  Attributes:
    pixels: uint8 [V, H, W, 3], the views of all images and then zeros.
    pieces: what stands for each image.
  """

  pixels: UInt8[np.ndarray, "V H W 3"]
  pieces: list[tuple[Piece, ...]]

  @classmethod
  def from_images(
    cls,
    images: Sequence[UInt8[np.ndarray, "..."]],
    preprocessor: Preprocessor,
    most: int,
  ) -> "Prompt":
    """Returns the views of some images, and what stands for them.

    Args:
      images: each [H, W, 3].
      preprocessor: of the model; its views are all of one size.
      most: V.

    Raises:
      UserError: there are no images, or more than V views.
    """
    made = [preprocessor.views(image) for image in images]
    count = sum(len(views.pixels) for views in made)
    if not made or count > most:
      raise UserError(
        f"views: found {count} of {len(made)} images, expected 1 to {most};"
        " allow more, or use a tiling that makes fewer"
      )
    pixels = np.concatenate([views.pixels for views in made])
    pixels = np.pad(pixels, ((0, most - count), (0, 0), (0, 0), (0, 0)))
    return cls(pixels, [preprocessor.pieces(views.plan) for views in made])

  @property
  def soft_tokens(self) -> int:
    """Number of placeholders."""
    return sum(
      piece.count
      for pieces in self.pieces
      for piece in pieces
      if isinstance(piece, Soft)
    )


def image_ids(
  pieces: Sequence[Piece], tokenizer: Any, image_token: int
) -> list[int]:
  """Returns the ids of what stands for an image.

  Args:
    pieces: from a preprocessor.
    tokenizer: of the language model.
    image_token: id of the placeholder.

  Raises:
    UserError: the tokenizer has no such token.
  """
  ids: list[int] = []
  for piece in pieces:
    if isinstance(piece, Soft):
      ids += [image_token] * piece.count
    elif isinstance(piece, Text):
      ids += tokenizer.encode(piece.text)
    else:
      ids.append(_token(piece.text, tokenizer))
  return ids


def _token(text: str, tokenizer: Any) -> int:
  """Returns the id of a token: a special one, or one of the vocabulary."""
  special = tokenizer.backend.token_to_id(text)
  ids = [special] if special is not None else tokenizer.encode(text)
  if len(ids) != 1:
    raise UserError(
      f"tokenizer: found no token {text!r}, which stands around images;"
      " expected the model's own tokenizer"
    )
  return ids[0]


def prompt_ids(
  question: str,
  prompt: Prompt,
  tokenizer: Any,
  image_token: int,
  template: Template,
) -> list[int]:
  """Returns the ids that the answer follows: images, then the question.

  Args:
    question: text; what it says of images is text as well.
    prompt: the images.
    tokenizer: has `encode(text)`.
    image_token: id of the placeholder.
    template: around the question.
  """
  ids = [
    i
    for pieces in prompt.pieces
    for i in image_ids(pieces, tokenizer, image_token)
  ]
  text = template.question.format(question=question)
  return ids + list(tokenizer.encode(text))


def tokens_of(
  sample: Sample,
  prompt: Prompt,
  tokenizer: Any,
  image_token: int,
  template: Template,
) -> Example:
  """Returns a sample's tokens; the loss covers its answer and the end."""
  before = prompt_ids(sample.question, prompt, tokenizer, image_token, template)
  text = template.answer.format(answer=sample.answer)
  answer = list(tokenizer.encode(text))
  if template.end:
    answer += list(tokenizer.stop[:1])
  mask = np.repeat([False, True], [len(before), len(answer)])
  return Example(np.asarray(before + answer, np.int32), mask)


def text_row(example: Example, length: int) -> Row:
  """Returns an example as a row of `length` tokens, a document of its own."""
  whole = packing.Piece(0, 0, len(example.tokens))
  rows = packing.PackedRows(
    [example.tokens], [[whole]], length, [example.loss_mask]
  )
  return rows[0]
