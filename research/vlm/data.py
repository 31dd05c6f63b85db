"""Questions about images as rows that a vision language model learns from.

A row is one sample: the placeholders of its images, the question, and the
answer, which alone is in the loss; or a conversation, whose images are in its
turns, and of which the assistant's messages are in the loss. A row's images are
drawn or read, and cut into views, when the row is. Rows of several shapes, and
rows that several samples share, are `research.vlm.buckets`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from research.data import packing, pipeline
from research.data.examples import Example
from research.data.packing import Row
from research.data.sources import Documents
from research.generation import generate
from research.ranges import AtLeast, NonNegativeInt, PositiveInt, Ranged
from research.typing import Int32, Params, UInt8, UserError
from research.vlm.encoders.grouped import GroupedViews
from research.vlm.encoders.native import CHANNELS, Images, Patches
from research.vlm.images.patches import patchify
from research.vlm.images.plan import Views
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.prompt_ids import joined_ids, text_ids
from research.vlm.images.prompts import Piece, PromptFormat, Soft
from research.vlm.images.resize import Size
from research.vlm.model import ANY_SIZE, VisionLanguageModel
from research.vlm.prompts import conversations
from research.vlm.prompts.conversations import ChatSample
from research.vlm.scenes.mixed import Mixed
from research.vlm.scenes.sample import Sample
from research.vlm.scenes.task import Task

AnySample = Sample | ChatSample
"""A question with its answer, or a conversation."""


@runtime_checkable
class Samples(Protocol):
  """A random-access sequence of samples, which are drawn or read one by one."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> AnySample: ...


@runtime_checkable
class Outlined(Protocol):
  """Samples whose texts and sizes of images are known without any pixel."""

  def outline(self, index: int) -> tuple[AnySample, tuple[Size, ...]]:
    """Returns a sample without its images, and (height, width) of each."""


def outline(samples: Samples, index: int) -> tuple[AnySample, tuple[Size, ...]]:
  """Returns a sample for its text, and (height, width) of its images.

  Pixels are drawn or read only where the samples cannot do without.
  """
  if isinstance(samples, Outlined):
    return samples.outline(index)
  sample = samples[index]
  return sample, tuple(image.shape[:2] for image in sample.images)


ViewPixels = UInt8[np.ndarray, "V H W 3"] | Patches | GroupedViews
"""The views of a row, on their way into a batch."""


@runtime_checkable
class ViewInputs(Protocol):
  """What a batch has of views: pixels, or what an encoder made of them."""

  def __call__(self, pixels: ViewPixels, used: int) -> Row:
    """Returns arrays `[V, ...]`.

    Args:
      pixels: of views, padded at the end.
      used: how many are no padding.
    """

  def with_encoder(
    self, model: Any, params: Params, trainable: str
  ) -> "ViewInputs":
    """Returns the same for a model, of which some paths are learned."""


@dataclasses.dataclass(frozen=True)
class Pixels:
  """Views as they are, which the model encodes in every step."""

  def __call__(self, pixels: ViewPixels, used: int) -> Row:
    """Returns `pixels`; at native resolution `patches` and `grids`.

    Of views whose patches are pooled together `pixels` and `groups`.
    """
    del used
    if isinstance(pixels, GroupedViews):
      return {"pixels": pixels.pixels, "groups": pixels.groups}
    if isinstance(pixels, Patches):
      return {"patches": pixels.pixels, "grids": pixels.grids}
    return {"pixels": pixels}

  def with_encoder(
    self, model: Any, params: Params, trainable: str
  ) -> "Pixels":
    del model, params, trainable
    return self


class ImageData:
  """Base of data whose `inputs` may need the experiment's encoder."""

  inputs: ViewInputs
  preprocessor: Preprocessor
  image_token: int
  template: "Template"

  def example(
    self, sample: AnySample, images: Sequence[tuple[Piece, ...]], tokenizer: Any
  ) -> Example:
    if isinstance(sample, ChatSample):
      return conversations.tokens_of(
        sample,
        images,
        tokenizer,
        self.image_token,
        self.preprocessor.prompt,
      )
    return tokens_of(
      sample,
      images,
      tokenizer,
      self.image_token,
      self.template,
      self.preprocessor.prompt,
    )

  def with_encoder(self, model: Any, params: Params, trainable: str) -> Any:
    """Returns the data of an experiment with this model.

    Args:
      trainable: regular expression of the paths that are learned.

    Raises:
      UserError: the preprocessor is another model's.
    """
    if isinstance(model, VisionLanguageModel):
      model.check_placeholders(self.preprocessor)
    inputs = self.inputs.with_encoder(model, params, trainable)
    return dataclasses.replace(self, inputs=inputs)


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
  """Texts of samples, without their images: what a tokenizer learns from."""

  samples: Task | Mixed
  template: Template = Template()

  def __len__(self) -> int:
    return len(self.samples)

  def __getitem__(self, index: int) -> str:
    sample = self.samples.drawn(index)
    question = self.template.question.format(question=sample.question)
    return question + self.template.answer.format(answer=sample.answer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageQuestions(Ranged, pipeline.ShuffledRows, ImageData):
  """Samples as rows of tokens and views; a `research.data.pipeline.Data`.

  Attributes:
    samples: questions about images, or about none, and conversations.
    preprocessor: how an image becomes views, and what stands for it.
    length: tokens of a row, T; a longer sample is refused.
    views: views of a row, V; a sample with more of them is refused.
    patches: places for patches of a view, N, at native resolution; an image of
      more is refused. None where views are of one size.
    template: the text around images; conversations have the tokenizer's.
    batch_size: rows in a batch over all processes.
    seed: of the shuffle.
    inputs: what rows have of views: `Pixels()`, or features of a frozen encoder
      (`research.vlm.cached`).
  """

  samples: Samples
  preprocessor: Preprocessor
  image_token: int
  length: AtLeast(2)
  views: PositiveInt = 1
  patches: int | None = None
  template: Template = Template()
  batch_size: PositiveInt = 8
  seed: NonNegativeInt = 0
  inputs: ViewInputs = Pixels()

  def __post_init__(self):
    super().__post_init__()
    self.preprocessor.check_patches("ImageQuestions", self.patches)

  def rows(self, tokenizer: Any) -> "ImageRows":
    return ImageRows(self, tokenizer)


@dataclasses.dataclass(frozen=True)
class ImageRows(Sequence):  # of `Row`: a check of types would make one
  """Rows of an `ImageQuestions`, made when they are read.

  Beside the keys of text, a row has `pixels`, uint8 [V, H, W, 3]; at native
  resolution `patches`, uint8 [V, N, X], and `grids`, int32 [V, 2] (`Patches`).
  Where it has fewer views, the rest are zeros.
  """

  data: ImageQuestions
  tokenizer: Any

  def __len__(self) -> int:
    return len(self.data.samples)

  def __getitem__(self, index: Any) -> Row:
    data, sample = self.data, self.data.samples[index]
    prompt = Prompt.from_images(
      sample.images, data.preprocessor, data.views, data.patches
    )
    example = data.example(sample, prompt.pieces, self.tokenizer)
    if len(example.tokens) > data.length:
      raise UserError(
        f"ImageQuestions.length: found {data.length}, expected at least"
        f" {len(example.tokens)}: {len(sample.images)} images with"
        f" {prompt.soft_tokens} soft tokens, and the text of {_name(sample)}"
      )
    pixels = prompt.pixels
    if isinstance(pixels, GroupedViews):  # a row has no more soft tokens
      pixels = pixels.padded(data.length)
    views = data.inputs(pixels, prompt.views)
    return row_of([example], data.length) | views


def _name(sample: AnySample) -> str:
  if isinstance(sample, ChatSample):
    return sample.conversation.where
  return repr(sample.question)


@dataclasses.dataclass(frozen=True)
class Prompt:
  """Images on their way into a prompt.

  Attributes:
    pixels: uint8 [V, H, W, 3], the views of all images and then zeros; or, at
      native resolution, their patches; or those views and groups of patches.
    pieces: what stands for each image.
    views: how many views are no padding.
  """

  pixels: ViewPixels
  pieces: list[tuple[Piece, ...]]
  views: int

  @classmethod
  def from_images(
    cls,
    images: Sequence[UInt8[np.ndarray, "..."]],
    preprocessor: Preprocessor,
    most: int,
    patches: int | None = None,
  ) -> "Prompt":
    """Returns the views of some images, and what stands for them.

    Args:
      most: V.
      patches: N, at native resolution; None for as many as the largest image
        has.

    Raises:
      UserError: there are more than V views, or an image of more than N
        patches.
    """
    made = [preprocessor.views(image) for image in images]
    count = sum(len(views.pixels) for views in made)
    if count > most:
      raise UserError(
        f"views: found {count} of {len(made)} images, expected at most {most};"
        " allow more, or use a tiling that makes fewer"
      )
    pieces = [preprocessor.pieces(views.plan) for views in made]
    if preprocessor.tiling.native_square is not None:
      return cls(patches_of(made, preprocessor, most, patches), pieces, count)
    # The views of a tiling are of one size, whatever the image.
    size = made[0].plan.view if made else preprocessor.plan(*ANY_SIZE).view
    padding = np.zeros((most - count, *size, 3), np.uint8)
    pixels = np.concatenate([*(views.pixels for views in made), padding])
    groups = _groups(made, preprocessor)
    if groups is not None:
      pixels = GroupedViews(pixels, groups)
    return cls(pixels, pieces, count)

  @property
  def soft_tokens(self) -> int:
    return sum(
      piece.count
      for pieces in self.pieces
      for piece in pieces
      if isinstance(piece, Soft)
    )


def patches_of(
  made: Sequence[Views],
  preprocessor: Preprocessor,
  most: int,
  count: int | None = None,
) -> Patches:
  """Returns the patches of images of native resolution, and then zeros.

  Args:
    count: N; None for as many as the largest image has.

  Raises:
    UserError: an image has more than N patches.
  """
  tiling = preprocessor.tiling
  found = [
    patchify(views.pixels[0], tiling.patch, tiling.native_square)[0]
    for views in made
  ]
  longest, size = max(map(len, found), default=0), tiling.patch**2 * CHANNELS
  out = Patches(
    np.zeros((most, longest, size), np.uint8), np.zeros((most, 2), np.int32)
  )
  for i, (patches, views) in enumerate(zip(found, made, strict=True)):
    out.pixels[i, : len(patches)] = patches.reshape(len(patches), -1)
    out.grids[i] = views.plan.patches
  return out.padded(longest if count is None else count)


def _groups(
  made: Sequence[Views], preprocessor: Preprocessor
) -> Int32[np.ndarray, "S G"] | None:
  """Returns the patches, of all images' views, that each soft token pools."""
  # An image of any size says whether the tiling groups patches.
  plans = [views.plan for views in made] or [preprocessor.plan(*ANY_SIZE)]
  groups, start = [], 0
  for plan in plans:
    own = preprocessor.tiling.groups(plan)
    if own is None:
      return None
    groups.append(np.where(own < 0, -1, own + start))
    start += plan.encoder_tokens
  found = np.concatenate(groups).astype(np.int32)
  return found if made else found[:0]


def batch_images(prompts: Sequence[Prompt], square: int = 1) -> Images:
  """Returns the images of some prompts, a row each.

  At native resolution the number of patches is rounded up, and so is that of
  groups of patches, so that few shapes are compiled.

  Args:
    prompts: of one preprocessor, with as many views each.
    square: side of the squares that the connector merges, in patches.
  """
  pixels = [prompt.pixels for prompt in prompts]
  if isinstance(pixels[0], GroupedViews):
    count = generate.bucket(max(x.groups.shape[0] for x in pixels))
    pixels = [x.padded(count) for x in pixels]
  if isinstance(pixels[0], Patches):
    # One at least, also where no prompt has an image.
    longest = max([1, *(x.shape[-2] for x in pixels)])
    count = generate.bucket(-(-longest // square**2)) * square**2
    pixels = [x.padded(count) for x in pixels]
  return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *pixels)


def prompt_ids(
  question: str,
  images: Sequence[tuple[Piece, ...]],
  tokenizer: Any,
  image_token: int,
  template: Template,
  form: PromptFormat,
) -> list[int]:
  """Returns the ids that the answer follows: images, then the question.

  Raises:
    UserError: the tokenizer reads a placeholder in the text.
  """
  text = template.question.format(question=question)
  texts = [*[""] * len(images), text]
  return joined_ids(texts, images, tokenizer, image_token, form)


def tokens_of(
  sample: Sample,
  images: Sequence[tuple[Piece, ...]],
  tokenizer: Any,
  image_token: int,
  template: Template,
  form: PromptFormat,
) -> Example:
  """Returns a sample's tokens; the loss covers its answer and the end."""
  before = prompt_ids(
    sample.question, images, tokenizer, image_token, template, form
  )
  text = template.answer.format(answer=sample.answer)
  answer = text_ids(text, tokenizer, image_token, before)
  if template.end:
    answer += list(tokenizer.stop[:1])
  mask = np.repeat([False, True], [len(before), len(answer)])
  return Example(np.asarray(before + answer, np.int32), mask)


def row_of(examples: Sequence[Example], length: int) -> Row:
  """Returns examples as one row of `length` tokens, each a document."""
  pieces = [packing.Piece(i, 0, len(x.tokens)) for i, x in enumerate(examples)]
  rows = packing.PackedRows(
    [x.tokens for x in examples],
    [pieces],
    length,
    [x.loss_mask for x in examples],
  )
  return rows[0]
