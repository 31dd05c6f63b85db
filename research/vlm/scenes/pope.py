"""Existence questions by POPE's protocol, over scenes with popular objects.

Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language
Models", ask about objects that are absent: random ones, popular ones, and those
that often stand next to what is present. Here pairs of colour and shape occur
by Zipf's law, and an adversarial question shares its colour or its shape with
an object of the scene. Unlike in POPE, answers are uniform given the text.
"""

import dataclasses
import functools
import itertools
from typing import ClassVar

import numpy as np

from research.typing import UInt8, UserError
from research.vlm.scenes import drawing
from research.vlm.scenes.rules import ATTRIBUTES, MAJORITY, BestGiven
from research.vlm.scenes.sample import YES_NO, Sample
from research.vlm.scenes.shapes import Pair, place
from research.vlm.scenes.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopeShapes(Task):
  """Is there such an object? Strata: random, popular, adversarial.

  Attributes:
    popular: how many of the most frequent pairs count as popular.
    max_objects: in a scene; there are at least two.
  """

  KINDS: ClassVar = ("exists",)
  STRATA: ClassVar = ("random", "popular", "adversarial")
  RULES: ClassVar = {
    "majority": MAJORITY,
    **ATTRIBUTES,
    "number of objects": BestGiven(lambda x: len(x.objects)),
  }

  colours: tuple[str, ...] = ("red", "green", "blue", "yellow")
  shapes: tuple[str, ...] = ("circle", "square", "triangle", "star")
  popular: int = 4
  max_objects: int = 6
  size: int = 64
  cells: int = 4

  def __post_init__(self):
    super().__post_init__()
    drawing.named(self.colours, "PopeShapes.colours")
    for name, found in (("colours", self.colours), ("shapes", self.shapes)):
      if len(set(found)) < 2:
        raise UserError(
          f"PopeShapes.{name}: found {found}, expected at least two."
        )
    self.expect("popular", 1, len(self.pairs))
    self.expect("max_objects", 2, self.cells**2)
    self.expect("size", 8 * self.cells)

  @functools.cached_property
  def pairs(self) -> list[Pair]:
    """All pairs of colour and shape, the most frequent first.

    They stand along the diagonals of the table, so that every colour and every
    shape is popular.
    """
    table = list(itertools.product(self.colours, self.shapes))
    return sorted(table, key=self._diagonal)

  def _diagonal(self, pair: Pair) -> tuple[int, int]:
    colour, shape = self.colours.index(pair[0]), self.shapes.index(pair[1])
    return (shape - colour) % len(self.shapes), colour

  def draw(self, rng: np.random.Generator, kind: str) -> Sample:
    pairs = self.pairs
    stratum = self.STRATA[rng.integers(len(self.STRATA))]
    most = self.popular if stratum == "popular" else len(pairs)
    colour, shape = pair = pairs[rng.integers(most)]
    answer = YES_NO[rng.integers(2)]

    absent = [x for x in pairs if x != pair]
    alike = [x for x in absent if (x[0] == colour) != (x[1] == shape)]
    total = int(rng.integers(2, self.max_objects + 1))
    scene = self._others(rng, alike if stratum == "adversarial" else absent, 1)
    scene += [pair] if answer == "yes" else self._others(rng, absent, 1)
    scene += self._others(rng, absent, total - 2)
    return Sample(
      (),
      f"Is there a {colour} {shape} in the image?",
      answer,
      kind,
      stratum,
      {"colour": colour, "shape": shape},
      place(rng, scene, self.size, self.cells),
      YES_NO,
    )

  def _others(
    self, rng: np.random.Generator, some: list[Pair], count: int
  ) -> list[Pair]:
    """Returns pairs drawn by Zipf's law, the i-th as often as 1 / i."""
    p = np.array([1 / (1 + self.pairs.index(x)) for x in some])
    return [some[i] for i in rng.choice(len(some), size=count, p=p / p.sum())]

  def render(self, sample: Sample) -> tuple[UInt8[np.ndarray, "..."], ...]:
    return (drawing.scene(sample.objects, self.size, self.size),)
