"""Images and captions as rows of contrastive batches."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from research.data import pipeline
from research.data.packing import Row
from research.data.sources import Documents
from research.ranges import AtLeast, NonNegativeInt, Ranged
from research.typing import Int32, UInt8, UserError
from research.vlm.data import Pixels, Prompt
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.resize import resize
from research.vlm.scenes.sample import Samples
from research.vlm.scenes.task import Task

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""An image, uint8 [H, W, 3], as training shows it."""

PLAIN = ("{}",)
"""Templates of captions that stay as they are."""

_STREAM = zlib.crc32(b"Captions")
"""Tells the generators of augmentations from those of samples."""


def same(
  image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "H W 3"]:
  """Returns the image."""
  del rng
  return image


def shifted(
  image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "H W 3"]:
  """Returns the image moved by up to an eighth of it, on its corner's colour.

  Args:
    image: of one thing on a plain ground.
    rng: of the distances.
  """
  most = [side // 8 for side in image.shape[:2]]
  down, right = (int(rng.integers(-n, n + 1)) for n in most)
  out = np.broadcast_to(image[0, 0], image.shape).copy()
  height, width = (
    side - abs(n) for side, n in zip(image.shape, (down, right), strict=False)
  )
  top, left = max(down, 0), max(right, 0)
  above, before = max(-down, 0), max(-right, 0)
  out[top : top + height, left : left + width] = image[
    above : above + height, before : before + width
  ]
  return out


def cropped(
  image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "H W 3"]:
  """Returns a part of the image at its size, every other time mirrored.

  The part has 0.7 to 1 of each side (a mild form of Szegedy et al. 2014,
  arXiv:1409.4842, section 6).

  Args:
    image: of anything that its mirror image is, too: no letters.
    rng: of the part.
  """
  height, width = image.shape[:2]
  share = rng.uniform(0.7, 1.0)
  rows, columns = max(1, int(share * height)), max(1, int(share * width))
  top = int(rng.integers(height - rows + 1))
  left = int(rng.integers(width - columns + 1))
  part = image[top : top + rows, left : left + columns]
  if rng.integers(2):
    part = part[:, ::-1]
  return resize(np.ascontiguousarray(part), (height, width), "bilinear")


def caption_tokens(
  text: str, tokenizer: Any, length: int
) -> Int32[np.ndarray, "T"]:
  """Returns a caption's tokens and the end, cut or padded to a length."""
  ids = [*tokenizer.encode(text)[: length - 1], *tokenizer.stop[:1]]
  ids += [tokenizer.pad or 0] * (length - len(ids))
  return np.asarray(ids, np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionTexts(Documents):
  """Captions in all of their templates: what a tokenizer learns from.

  Attributes:
    samples: whose answers are captions.
    templates: around a caption, which stands for `{}`.
  """

  samples: Task
  templates: tuple[str, ...] = PLAIN

  def __len__(self) -> int:
    return len(self.samples) * len(self.templates)

  def __getitem__(self, index: int) -> str:
    number, which = divmod(index, len(self.templates))
    return self.templates[which].format(self.samples.drawn(number).answer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captions(Ranged, pipeline.ShuffledRows):
  """Pictures with captions as rows; a `research.data.pipeline.Data`.

  A row has `pixels`, uint8 [1, H, W, 3], or, at native resolution, `patches`,
  uint8 [1, N, X], and `grids`, int32 [1, 2]; `captions`, int32 [T]; and `ids`,
  a hash of the caption without its template: rows of a batch that have the same
  one are no negatives of each other.

  Attributes:
    samples: each with one image, whose answer is the caption.
    preprocessor: makes one view of an image.
    length: tokens of a caption, T; longer ones are cut.
    patches: places for patches of an image, N, at native resolution; None where
      views are of one size.
    templates: each sample's caption gets one of them, by the sample's index.
    augment: the image as training shows it, by the sample's index.
    batch_size: rows in a batch over all processes.
    seed: of the shuffle, the templates and the augmentation.
  """

  samples: Samples
  preprocessor: Preprocessor
  length: AtLeast(2)
  patches: int | None = None
  templates: tuple[str, ...] = PLAIN
  augment: Augment = same
  batch_size: AtLeast(2) = 64
  seed: NonNegativeInt = 0

  def __post_init__(self):
    super().__post_init__()
    self.preprocessor.check_patches("Captions", self.patches)
    self.preprocessor.check_one_view("Captions.preprocessor")
    check_templates("Captions", self.templates)

  def rows(self, tokenizer: Any) -> "CaptionRows":
    return CaptionRows(self, tokenizer)

  def evaluation(self, tokenizer: Any, limit: int | None = None) -> list[Row]:
    """Returns all rows once, in order; what pads the last batch is marked."""
    batches = super().evaluation(tokenizer, limit)
    missing = len(batches) * self.batch_size - len(self.samples)
    if batches and missing > 0:
      batches[-1]["ids"][-missing:] = -1
    return batches


@dataclasses.dataclass(frozen=True)
class CaptionRows(Sequence):  # of `Row`: a check of types would make one
  """Rows of `Captions`, made when they are read."""

  data: Captions
  tokenizer: Any

  def __len__(self) -> int:
    return len(self.data.samples)

  def __getitem__(self, index: Any) -> Row:
    data, sample = self.data, self.data.samples[index]
    # Not [seed, index]: a task draws the sample from [seed, index, 0], which is
    # the same stream in NumPy, so a shift would name a digit.
    rng = np.random.default_rng([_STREAM, data.seed, index])
    image = data.augment(sample.image, rng)
    template = data.templates[int(rng.integers(len(data.templates)))]
    text = template.format(sample.answer)
    prompt = Prompt.from_images([image], data.preprocessor, 1, data.patches)
    return {
      **Pixels()(prompt.pixels, used=1),
      "captions": caption_tokens(text, self.tokenizer, data.length),
      "ids": np.int32(zlib.crc32(sample.answer.encode()) >> 1),
    }


def check_templates(where: str, templates: Sequence[str]) -> None:
  """Raises UserError unless each template has one place for a caption."""
  wrong = [x for x in templates if x.count("{}") != 1]
  if wrong or not templates:
    raise UserError(
      f"{where}.templates: found {wrong[0] if wrong else 'none'!r}, expected"
      " texts with one {} each, for the caption."
    )
