"""Captioned pictures: the stamps of Tux Paint, from the installed package.

Debian's `tuxpaint-stamps-default` has 951 PNGs with a caption each, in a tree
of folders: the only real image-caption pairs that come in a package. They are
under the GPL, and read from where the package puts them. A caption belongs to
one split, and so do all pictures that share it.
"""

import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from PIL import Image

from research.data.sources import Split
from research.ranges import Between
from research.typing import UInt8, UserError
from research.vlm.scenes.rules import MAJORITY, PerSample, yes_no
from research.vlm.scenes.sample import YES_NO, Object, Sample
from research.vlm.scenes.task import Task, pick

FOLDER = "/usr/share/tuxpaint/stamps"
"""Where the package puts them."""

_PACKAGE = "tuxpaint-stamps-default"


@dataclasses.dataclass(frozen=True)
class Stamp:
  """A picture and its caption.

  Attributes:
    path: of the PNG.
    name: path below the stamps' folder, without suffix: "animals/birds/crow".
    caption: in English, the first line of the text beside the PNG.
  """

  path: pathlib.Path
  name: str
  caption: str

  @property
  def category(self) -> str:
    """The first folder, one of 16."""
    return self.name.split("/")[0]

  @property
  def folder(self) -> str:
    return self.name.rpartition("/")[0]

  @property
  def split(self) -> Split:
    """The split of the caption: 8 of 10 are train, one each the others."""
    part = zlib.crc32(self.caption.lower().encode()) % 10
    return {0: "validation", 1: "heldout"}.get(part, "train")

  def image(
    self, size: int, background: tuple[int, int, int] = (255, 255, 255)
  ) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the picture on a square, as large as fits.

    Args:
      size: width and height, in pixels.
      background: behind what is transparent: red, green, blue.

    Raises:
      UserError: the file is damaged.
    """
    try:
      with Image.open(self.path) as file:
        picture = file.convert("RGBA")
    except (
      OSError,
      ValueError,
      SyntaxError,
      Image.DecompressionBombError,
    ) as e:
      raise UserError(
        f"{self.path}: cannot be read ({e}).\nExpected a PNG; install the"
        f" package {_PACKAGE} again."
      ) from e
    scale = size / max(picture.size)
    inner = [max(1, round(side * scale)) for side in picture.size]
    picture = picture.resize(inner, Image.LANCZOS)
    canvas = Image.new("RGBA", (size, size), (*background, 255))
    corner = tuple((size - side) // 2 for side in inner)
    canvas.alpha_composite(picture, corner)
    return np.asarray(canvas.convert("RGB"))


@functools.cache
def read_stamps(folder: str = FOLDER) -> tuple[Stamp, ...]:
  """Returns the pictures that have a caption, in order of their names.

  Args:
    folder: with PNGs and, beside each, a `.txt` of the same name.

  Raises:
    UserError: there are none.
  """
  root = pathlib.Path(folder)
  stamps = []
  for path in sorted(root.rglob("*.png")):
    text = path.with_suffix(".txt")
    if text.exists():
      lines = text.read_text("utf-8", "replace").splitlines()
      if caption := " ".join(lines[0].split()) if lines else "":
        name = path.relative_to(root).with_suffix("").as_posix()
        stamps.append(Stamp(path, name, caption))
  if not stamps:
    raise UserError(
      f"{folder}: found no captioned pictures.\nInstall Debian's package"
      f" {_PACKAGE} (apt-get install {_PACKAGE}), or name the folder in which"
      " it is unpacked."
    )
  return tuple(stamps)


@functools.cache
def _of_split(folder: str, split: Split) -> list[Stamp]:
  return [x for x in read_stamps(folder) if x.split == split]


@functools.cache
def _numbers(folder: str) -> dict[str, int]:
  """Returns name -> index in `read_stamps`."""
  return {x.name: i for i, x in enumerate(read_stamps(folder))}


@functools.lru_cache(maxsize=1024)
def _image(
  stamp: Stamp, size: int, background: tuple[int, int, int]
) -> UInt8[np.ndarray, "H W 3"]:
  # All of the package's at 64 pixels are 12 MB; decoding takes milliseconds.
  image = stamp.image(size, background)
  image.setflags(write=False)
  return image


def _shown(x: Sample) -> str:
  return x.objects[0].name


def _same_folder(x: Sample) -> str:
  return yes_no(_shown(x).rpartition("/")[0] == x.program["folder"])


def _same_category(x: Sample) -> str:
  return yes_no(_shown(x).split("/")[0] == x.program["category"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stamps(Task):
  """Questions about real pictures.

  | kind | asks | strata |
  | --- | --- | --- |
  | caption | what it shows; the answer is the caption | its category |
  | category | in which of 16 folders it is, uniform | its category |
  | exists | whether a caption is its own | random, category, folder |

  A negative of "exists" shows a picture of any other category, of the same
  category, or of the same last folder; a positive shows the caption's own.

  Attributes:
    folder: of the installed package.
    background: behind what is transparent. On white, a white cloud is gone.
  """

  KINDS: ClassVar = ("caption", "category", "exists")
  RULES: ClassVar = {
    "majority": MAJORITY,
    "category only": PerSample(_same_category, ("exists",)),
    "folder only": PerSample(_same_folder, ("exists",)),
  }

  folder: str = FOLDER
  size: Between(8, 4096) = 64
  background: tuple[int, int, int] = (255, 255, 255)

  def belongs(self, sample: Sample) -> bool:
    """All are: they are drawn from this split's captions."""
    return True

  def stamps(self) -> list[Stamp]:
    return _of_split(self.folder, self.split)

  def draw(self, rng: np.random.Generator, kind: str) -> Sample:
    return getattr(self, f"_{kind}")(rng)

  def _caption(self, rng: np.random.Generator) -> Sample:
    stamp = pick(rng, self.stamps())
    text = "What is in the picture?"
    return self._sample("caption", text, stamp.caption, stamp.category, stamp)

  def _category(self, rng: np.random.Generator) -> Sample:
    choices = tuple(sorted({x.category for x in read_stamps(self.folder)}))
    stamps = self.stamps()
    category = pick(rng, sorted({x.category for x in stamps}))
    stamp = pick(rng, [x for x in stamps if x.category == category])
    text = "What kind of thing is in the picture?"
    return self._sample("category", text, category, category, stamp, choices)

  def _exists(self, rng: np.random.Generator) -> Sample:
    stamps = self.stamps()
    stratum, alike = pick(rng, list(_NEGATIVES.items()))
    answer = pick(rng, YES_NO)
    while True:
      asked = pick(rng, stamps)
      others = [
        x for x in stamps if x.caption != asked.caption and alike(asked, x)
      ]
      if others:
        break
    stamp = asked if answer == "yes" else pick(rng, others)
    text = f"Does this describe the picture? {asked.caption}"
    program = {
      "caption": asked.caption,
      "category": asked.category,
      "folder": asked.folder,
    }
    return self._sample("exists", text, answer, stratum, stamp, YES_NO, program)

  def _sample(
    self, kind, text, answer, stratum, stamp, choices=(), program=None
  ) -> Sample:
    source = _numbers(self.folder)[stamp.name]
    box = (0, 0, self.size, self.size)
    objects = (Object(stamp.name, "", box, source=source),)
    return Sample(
      (), text, answer, kind, stratum, program or {}, objects, choices
    )

  def render(self, sample: Sample) -> tuple[UInt8[np.ndarray, "..."], ...]:
    stamp = read_stamps(self.folder)[sample.objects[0].source]
    return (_image(stamp, self.size, self.background),)


_NEGATIVES: dict[str, Callable[[Stamp, Stamp], bool]] = {
  "random": lambda asked, x: x.category != asked.category,
  "category": lambda asked, x: x.category == asked.category,
  "folder": lambda asked, x: x.folder == asked.folder,
}
