"""Scenes of real handwritten digits: reading, counting, sums, existence, names.

The 1,797 digits of the UCI set "Optical Recognition of Handwritten Digits"
(Alpaydin & Kaynak 1998), 8x8 pixels of 0 to 16, come from the installed package
scikit-learn. A digit's image belongs to one split, by a hash of its pixels.
"""

import dataclasses
import functools
import gzip
import importlib.util
import pathlib
import zlib
from typing import ClassVar

import numpy as np
from PIL import Image

from research.data.sources import Split
from research.ranges import AtLeast, Between
from research.typing import Int, UInt8, UserError
from research.vlm.scenes.rules import MAJORITY, BestGiven
from research.vlm.scenes.sample import YES_NO, Object, Sample
from research.vlm.scenes.task import Task

SIDE = 8
"""Of a digit's image in the data set, in pixels."""
NAMES = ("zero", "one", "two", "three", "four") + (
  *("five", "six", "seven", "eight", "nine"),
)
"""Of the digits, in order."""
_LARGEST = 16
_FILE = ("datasets", "data", "digits.csv.gz")


@functools.cache
def load() -> tuple[UInt8[np.ndarray, "B 8 8"], UInt8[np.ndarray, "B"]]:
  """Returns the images, 0 to 16 (ink), and their digits.

  Raises:
    UserError: scikit-learn is not installed, or has another file.
  """
  found = importlib.util.find_spec("sklearn")
  if found is None or found.origin is None:
    raise UserError(
      "digits: the package scikit-learn, which has the images, is not"
      " installed.\nInstall it with: pip install -e '.[vlm]'"
    )
  path = pathlib.Path(found.origin).parent.joinpath(*_FILE)
  try:
    with gzip.open(path, "rt") as file:
      table = np.loadtxt(file, np.uint8, delimiter=",")
  except (OSError, ValueError, EOFError) as error:
    raise UserError(
      f"{path}: cannot be read ({error}).\nExpected scikit-learn's digits;"
      " install it again."
    ) from error
  if table.ndim != 2 or table.shape[1] != SIDE**2 + 1 or table.max() > _LARGEST:
    raise UserError(
      f"{path}: found a table {table.shape}, expected rows of 64 pixels from 0"
      " to 16 and a digit; install scikit-learn again."
    )
  return table[:, :-1].reshape(-1, SIDE, SIDE), table[:, -1]


@functools.cache
def indices(split: Split) -> dict[int, Int[np.ndarray, "B"]]:
  """Returns digit -> indices of its images in a split: 8 of 10 are train."""
  images, digits = load()
  parts = np.array([zlib.crc32(x.tobytes()) % 10 for x in images])
  within = {
    "train": parts > 1,
    "validation": parts == 0,
    "heldout": parts == 1,
  }[split]
  return {d: np.flatnonzero(within & (digits == d)) for d in range(10)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(Task):
  """Questions about handwritten digits on a canvas.

  | kind | asks | strata |
  | --- | --- | --- |
  | read | the digits in a row, such as "4 0 7" | the number drawn |
  | total | how many digits there are | none |
  | count | how many of one digit: 0 to `max_count` | the number drawn |
  | sum | of two digits: 0 to 18, uniform | to 9, above 9 |
  | exists | whether there is a digit | the number drawn |

  Attributes:
    max_digits: on the canvas; two at least.
    max_count: largest count of one digit.
    scale: pixels for each of the 8x8 pixels, along a side.
    cells: along each side of the grid; a digit takes one.
  """

  KINDS: ClassVar = ("read", "total", "count", "sum", "exists")
  RULES: ClassVar = {
    "majority": MAJORITY,
    "number of digits": BestGiven(
      lambda x: len(x.objects), ("count", "exists", "read")
    ),
    "one digit only": BestGiven(lambda x: x.objects[0].name, ("sum", "read")),
  }

  max_digits: int = 6
  max_count: int = 3
  scale: Between(1, 64) = 2
  cells: AtLeast(2) = 4

  def __post_init__(self):
    super().__post_init__()
    self.expect("max_digits", 2, self.cells**2)
    self.expect("max_count", 1, self.max_digits)

  @property
  def size(self) -> int:
    return self.cells * self.scale * SIDE

  def belongs(self, sample: Sample) -> bool:
    """All are: they are drawn from this split's images."""
    return True

  def draw(self, rng: np.random.Generator, kind: str) -> Sample:
    return getattr(self, f"_{kind}")(rng)

  def _read(self, rng: np.random.Generator) -> Sample:
    total = int(rng.integers(2, min(self.max_digits, self.cells) + 1))
    digits = rng.integers(10, size=total)
    row = rng.integers(self.cells)
    columns = np.sort(rng.permutation(self.cells)[:total])
    objects = self._objects(rng, digits, row * self.cells + columns)
    answer = " ".join(x.name for x in objects)
    text = "Which digits are there, from left to right?"
    return Sample((), text, answer, "read", f"{total} drawn", {}, objects)

  def _total(self, rng: np.random.Generator) -> Sample:
    total = int(rng.integers(1, self.max_digits + 1))
    objects = self._objects(rng, rng.integers(10, size=total))
    choices = tuple(str(i + 1) for i in range(self.max_digits))
    text = "How many digits are there?"
    return Sample((), text, str(total), "total", "all", {}, objects, choices)

  def _count(self, rng: np.random.Generator) -> Sample:
    asked, count = int(rng.integers(10)), int(rng.integers(self.max_count + 1))
    total = int(rng.integers(self.max_count, self.max_digits + 1))
    digits = [asked] * count + _others(rng, asked, total - count)
    choices = tuple(map(str, range(self.max_count + 1)))
    return Sample(
      (),
      f"How many {asked}s are there?",
      str(count),
      "count",
      f"{total} drawn",
      {"digit": str(asked)},
      self._objects(rng, digits),
      choices,
    )

  def _sum(self, rng: np.random.Generator) -> Sample:
    total = int(rng.integers(19))
    first = int(rng.integers(max(0, total - 9), min(9, total) + 1))
    objects = self._objects(rng, [first, total - first])
    choices = tuple(map(str, range(19)))
    stratum = "to 9" if total < 10 else "above 9"
    text = "What is the sum of the digits?"
    return Sample((), text, str(total), "sum", stratum, {}, objects, choices)

  def _exists(self, rng: np.random.Generator) -> Sample:
    asked, answer = int(rng.integers(10)), YES_NO[rng.integers(2)]
    total = int(rng.integers(1, self.max_digits + 1))
    digits = _others(rng, asked, total)
    if answer == "yes":
      digits[0] = asked
    return Sample(
      (),
      f"Is there a {asked}?",
      answer,
      "exists",
      f"{total} drawn",
      {"digit": str(asked)},
      self._objects(rng, digits),
      YES_NO,
    )

  def _objects(self, rng, digits, cells=None) -> tuple[Object, ...]:
    """Returns objects in these cells, row by row; in any order without."""
    if cells is None:
      cells = rng.permutation(self.cells**2)[: len(digits)]
    pools, side = indices(self.split), self.scale * SIDE
    objects = []
    for digit, cell in zip(digits, cells, strict=True):
      row, column = divmod(int(cell), self.cells)
      pool = pools[int(digit)]
      source = int(pool[rng.integers(len(pool))])
      left, top = column * side, row * side
      box = (left, top, left + side, top + side)
      objects.append(Object(str(digit), "", box, source=source))
    return tuple(sorted(objects, key=lambda x: (x.box[1], x.box[0])))

  def render(self, sample: Sample) -> tuple[UInt8[np.ndarray, "..."], ...]:
    return (_canvas(sample.objects, self.size),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitNames(Task):
  """One handwritten digit, whose caption is its name, such as "seven".

  | kind | strata |
  | --- | --- |
  | caption | the digit |

  Attributes:
    scale: pixels for each of the 8x8 pixels, along a side.
  """

  KINDS: ClassVar = ("caption",)

  scale: Between(1, 64) = 4

  @property
  def size(self) -> int:
    return self.scale * SIDE

  def belongs(self, sample: Sample) -> bool:
    return True

  def draw(self, rng: np.random.Generator, kind: str) -> Sample:
    digit = int(rng.integers(10))
    pool = indices(self.split)[digit]
    source = int(pool[rng.integers(len(pool))])
    box = (0, 0, self.size, self.size)
    objects = (Object(str(digit), "", box, source=source),)
    text = "What is in the picture?"
    return Sample((), text, NAMES[digit], kind, str(digit), {}, objects, NAMES)

  def render(self, sample: Sample) -> tuple[UInt8[np.ndarray, "..."], ...]:
    return (_canvas(sample.objects, self.size),)


def _canvas(objects: tuple[Object, ...], size: int) -> np.ndarray:
  """Returns digits on white, uint8 `[size, size, 3]`."""
  images, _ = load()
  canvas = np.full((size, size, 3), 255, np.uint8)
  for x in objects:
    left, top, right, bottom = x.box
    ink = images[x.source].astype(np.float32) * (255 / _LARGEST)
    picture = Image.fromarray((255 - ink).round().astype(np.uint8))
    scaled = picture.resize((right - left, bottom - top), Image.BICUBIC)
    canvas[top:bottom, left:right] = np.asarray(scaled)[..., None]
  return canvas


def _others(rng: np.random.Generator, asked: int, count: int) -> list[int]:
  """Returns digits that are not the one asked about."""
  return [int(d + (d >= asked)) for d in rng.integers(9, size=count)]
