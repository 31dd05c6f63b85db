"""A task: a sequence whose i-th sample depends on its seed and i alone.

Samples are drawn when they are read, so a task of a million costs nothing, and
workers of a data pipeline read any part of it. A drawn scene belongs to one
split, by a hash of its objects: no scene occurs in two splits, whatever the
seeds, and questions about one image stay together.
"""

import abc
import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, overload

import numpy as np

from research.data.sources import Split
from research.ranges import NonNegativeInt, Ranged
from research.typing import UInt8, UserError
from research.vlm.images.resize import Size
from research.vlm.scenes.rules import MAJORITY, BestGiven, Rule
from research.vlm.scenes.sample import Object, Sample, Samples

_ATTEMPTS = 2000
_PARTS = 10
_VALIDATION, _HELDOUT = 0, 1


def pick[T](rng: np.random.Generator, values: Sequence[T]) -> T:
  """Returns one of some values, each as likely as any other."""
  return values[int(rng.integers(len(values)))]


def split_of(objects: Iterable[Object]) -> Split:
  """Returns the split of a scene: 8 of 10 are train, one each the others."""
  part = zlib.crc32(repr(tuple(objects)).encode()) % _PARTS
  if part == _VALIDATION:
    return "validation"
  return "heldout" if part == _HELDOUT else "train"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Ranged, Samples, abc.ABC):
  """Samples of a kind of scene; subclasses draw and render them.

  Attributes:
    kinds: of questions, asked in turn; empty for all of the task's.
    split: which scenes; none is in two splits.

  Of many kinds `size` is the image's width and height, or `width` and `height`
  are, in pixels; `colours` and `shapes` are names; and objects stand on a grid
  of `cells` along each side, one in each.
  """

  KINDS: ClassVar[tuple[str, ...]]
  RULES: ClassVar[Mapping[str, Rule]] = {"majority": MAJORITY}

  kinds: tuple[str, ...] = ()
  count: NonNegativeInt = 1024
  seed: NonNegativeInt = 0
  split: Split = "train"

  def __post_init__(self):
    super().__post_init__()
    unknown = [x for x in self.kinds if x not in self.KINDS]
    if unknown:
      raise UserError(
        f"{type(self).__name__}.kinds: found {unknown[0]!r}, expected some of"
        f" {', '.join(self.KINDS)}."
      )

  @abc.abstractmethod
  def draw(self, rng: np.random.Generator, kind: str) -> Sample:
    """Returns a sample without images."""

  @abc.abstractmethod
  def render(self, sample: Sample) -> tuple[UInt8[np.ndarray, "..."], ...]:
    """Returns the images of a drawn sample, which depend on nothing else."""

  def image_sizes(self, sample: Sample) -> tuple[Size, ...]:
    """Returns (height, width) of each image of a drawn sample.

    Tasks that know them without rendering say so.
    """
    return tuple(image.shape[:2] for image in self.render(sample))

  def outline(self, index: int) -> tuple[Sample, tuple[Size, ...]]:
    sample = self.drawn(index)
    return sample, self.image_sizes(sample)

  def belongs(self, sample: Sample) -> bool:
    return split_of(sample.objects) == self.split

  def rules(self, samples: int = 2048) -> dict[str, Rule]:
    """Returns the task's rule baselines, `RULES`, ready to answer.

    Args:
      samples: of the split "train", that rules which count answers count.
    """
    train = dataclasses.replace(
      self, split="train", seed=self.seed + 1, count=samples
    )
    drawn = [train.drawn(i) for i in range(samples)]
    return {
      name: rule.fit(drawn) if isinstance(rule, BestGiven) else rule
      for name, rule in self.RULES.items()
    }

  def __len__(self) -> int:
    return self.count

  @overload
  def __getitem__(self, index: int) -> Sample: ...
  @overload
  def __getitem__(self, index: slice) -> list[Sample]: ...

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(self.count))]
    sample = self.drawn(range(self.count)[index])  # or IndexError
    return dataclasses.replace(sample, images=self.render(sample))

  def drawn(self, index: int) -> Sample:
    """Returns a sample without its images, which take most of the time.

    Raises:
      UserError: there is hardly any such scene in this split.
    """
    kinds = self.kinds or self.KINDS
    kind = kinds[index % len(kinds)]
    for attempt in range(_ATTEMPTS):
      rng = np.random.default_rng([self.seed, index, attempt])
      sample = self.draw(rng, kind)
      if self.belongs(sample):
        return sample
    raise UserError(
      f"{type(self).__name__}: found no scene of split {self.split!r} in"
      f" {_ATTEMPTS} draws of kind {kind!r}: the settings admit too few."
    )
