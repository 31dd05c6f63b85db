"""Coloured shapes on a grid: counting, existence, relations, colours, binding.

Answers are uniform given the question's text: the question is drawn first, then
the answer, then a scene in which it is true; so text alone scores chance. What
else could give the answer away does not depend on it: the number of objects,
and in the stratum "both, unbound" all colours and all shapes of the scene.
"""

import collections
import dataclasses
import functools
import itertools
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from research.ranges import Whole
from research.typing import UInt8, UserError
from research.vlm.images.resize import Size
from research.vlm.scenes import drawing
from research.vlm.scenes.rules import (
  ATTRIBUTES,
  MAJORITY,
  BestGiven,
  PerSample,
  question_part,
  yes_no,
)
from research.vlm.scenes.sample import YES_NO, Object, Sample
from research.vlm.scenes.task import Task, pick

Pair = tuple[str, str]
"""A colour and a shape."""

RELATIONS = {  # relation -> axis, and the sign of first minus second
  "left of": (0, -1),
  "right of": (0, 1),
  "above": (1, -1),
  "below": (1, 1),
}


class Draft(NamedTuple):
  """A sample before its objects have places.

  Attributes:
    stratum: of the sample.
    program: what the question names.
    pairs: colour and shape of each object.
    cells: column and row of the first objects; the others' are drawn.
  """

  question: str
  answer: str
  choices: tuple[str, ...]
  stratum: str
  program: dict[str, str | int]
  pairs: list[Pair]
  cells: tuple[tuple[int, int], ...] = ()


def _first_only(x: Sample) -> str:
  """Says where the first-named object is, whatever the second one does."""
  axis, sign = RELATIONS[question_part(x, "relation")]
  (first,) = _named(x, "first")
  low = first.centre[axis] < int(x.program["size"]) / 2
  return yes_no(low == (sign < 0))


def _commonest(x: Sample) -> str:
  counts = collections.Counter(object.colour for object in x.objects)
  return min(counts, key=lambda colour: (-counts[colour], colour))


def _named(x: Sample, which: str) -> list[Object]:
  colour, shape = question_part(x, which).split(" ")
  return [o for o in x.objects if (o.colour, o.name) == (colour, shape)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes(Task):
  """Questions about coloured shapes; see the module's docstring.

  | kind | strata |
  | --- | --- |
  | count | colour, shape, pair: what the question names |
  | exists | absent, one, both: which of the asked attributes negatives have |
  | relation | same half, across: of the image, for the two objects |
  | colour | 1-3 objects, 4 or more |
  | compare | by one, by more |

  A stratum of "exists" has negatives in which neither attribute occurs, one of
  them, or both on different objects ("both, unbound"), and as many positives
  that are otherwise drawn alike.

  Attributes:
    colours: names of colours, at least three.
    shapes: names of shapes, at least three.
    max_count: largest count; counts are uniform from 0.
    max_objects: in a scene.
    cells: along each side of the grid, even, at least 4; an object takes one.
    held_out: colour-shape pairs that familiar scenes do not have.
    composition: "familiar", or "novel": questions about pairs held out.
  """

  KINDS: ClassVar = ("count", "exists", "relation", "colour", "compare")
  RULES: ClassVar = {
    "majority": MAJORITY,
    **ATTRIBUTES,
    "number of objects": BestGiven(lambda x: len(x.objects)),
    "first object only": PerSample(_first_only, ("relation",)),
    "commonest colour": PerSample(_commonest, ("colour",)),
    "first count only": BestGiven(
      lambda x: x.count(question_part(x, "first")), ("compare",)
    ),
  }

  colours: tuple[str, ...] = ("red", "green", "blue")
  shapes: tuple[str, ...] = ("circle", "square", "triangle")
  max_count: int = 4
  max_objects: int = 8
  size: int = 64
  cells: Whole(at_least=4, multiple=2) = 4
  held_out: tuple[Pair, ...] = ()
  composition: Literal["familiar", "novel"] = "familiar"

  def __post_init__(self):
    super().__post_init__()
    drawing.named(self.colours, "Shapes.colours")
    for name, found in (("colours", self.colours), ("shapes", self.shapes)):
      known = drawing.COLOURS if name == "colours" else drawing.SHAPES
      if len(set(found)) < 3 or not set(found) <= set(known):
        raise UserError(
          f"Shapes.{name}: found {found}, expected at least three of"
          f" {', '.join(known)}."
        )
    self.expect("max_count", 2, self.max_objects)
    self.expect("max_objects", 4, self.cells**2)
    self.expect("size", 8 * self.cells)
    if self.composition == "novel":
      if not self.held_out:
        raise UserError(
          "Shapes.composition: found 'novel' without pairs; name some in"
          " Shapes.held_out."
        )
      if not set(self.kinds) <= {"count", "exists"} or not self.kinds:
        raise UserError(
          "Shapes.composition: found 'novel' with kinds that name no pair;"
          " say kinds=('count', 'exists') or one of the two."
        )
    self._check_held_out()

  def _check_held_out(self) -> None:
    known = set(itertools.product(self.colours, self.shapes))
    left = known - set(self.held_out)
    poor = [
      x
      for x in (*self.colours, *self.shapes)
      if sum(x in pair for pair in left) < 2
    ]
    if not set(self.held_out) <= known or poor or not self._squares:
      raise UserError(
        f"Shapes.held_out: found {self.held_out}, expected pairs of a colour"
        " and a shape that leave two pairs of each, and some to ask about."
      )

  # Pairs

  @functools.cached_property
  def _possible(self) -> list[Pair]:
    out = set(self.held_out) if self.composition == "familiar" else ()
    pairs = itertools.product(self.colours, self.shapes)
    return [pair for pair in pairs if pair not in out]

  @functools.cached_property
  def _squares(self) -> list[tuple[Pair, Pair, Pair, Pair]]:
    """Returns (asked, other, colour only, shape only) for "both, unbound"."""
    possible = set(self._possible)
    return [
      (a, b, (a[0], b[1]), (b[0], a[1]))
      for a in self._asked_pairs
      for b in sorted(possible)
      if a[0] != b[0]
      and a[1] != b[1]
      and {(a[0], b[1]), (b[0], a[1])} <= possible
    ]

  @functools.cached_property
  def _asked_pairs(self) -> list[Pair]:
    if self.composition == "familiar":
      return self._possible
    return list(self.held_out)

  # Kinds

  def _count(self, rng: np.random.Generator) -> Draft:
    forms = ("colour", "shape", "pair")
    form = "pair" if self.composition == "novel" else pick(rng, forms)
    colour, shape = pick(rng, self._asked_pairs)
    program = {"colour": colour, "shape": shape}
    if form != "pair":
      program = {form: program[form]}
    match = [p for p in self._possible if _matches(p, program)]
    rest = [p for p in self._possible if not _matches(p, program)]
    count = int(rng.integers(self.max_count + 1))
    total = int(rng.integers(self.max_count, self.max_objects + 1))
    pairs = _picks(rng, match, count) + _picks(rng, rest, total - count)
    thing = {
      "colour": f"{colour} objects",
      "shape": f"{shape}s",
      "pair": f"{colour} {shape}s",
    }[form]
    numbers = tuple(map(str, range(self.max_count + 1)))
    text = f"How many {thing} are there?"
    return Draft(text, str(count), numbers, form, program, pairs)

  def _exists(self, rng: np.random.Generator) -> Draft:
    pair, other, has_colour, has_shape = pick(rng, self._squares)
    colour, shape = pair
    stratum = pick(rng, ("absent", "one", "both"))
    answer = pick(rng, YES_NO)
    total = int(rng.integers(2, self.max_objects + 1))
    possible = self._possible
    if stratum == "both":
      # The same bags of colours and shapes, bound in one way or the other.
      two = [pair, other] if answer == "yes" else [has_colour, has_shape]
      rest = [p for p in possible if p != pair]
    else:
      given = None if stratum == "absent" else rng.integers(2)
      rest = [
        p
        for p in possible
        if (given == 0 or p[0] != colour) and (given == 1 or p[1] != shape)
      ]
      first = other if given is None else (has_colour, has_shape)[given]
      two = [first, pair if answer == "yes" else pick(rng, rest)]
    return Draft(
      f"Is there a {colour} {shape}?",
      answer,
      YES_NO,
      stratum,
      {"colour": colour, "shape": shape},
      two + _picks(rng, rest, total - 2),
    )

  def _relation(self, rng: np.random.Generator) -> Draft:
    pairs = self._possible
    first, second = (pairs[i] for i in rng.permutation(len(pairs))[:2])
    relation = pick(rng, tuple(RELATIONS))
    axis, sign = RELATIONS[relation]
    answer = pick(rng, YES_NO)
    stratum = pick(rng, ("same half", "across"))
    half = self.cells // 2
    low, high = pick(
      rng,
      [
        ends
        for ends in itertools.combinations(range(self.cells), 2)
        if (ends[0] // half == ends[1] // half) == (stratum == "same half")
      ],
    )
    first_is_low = (sign < 0) == (answer == "yes")
    along = (low, high) if first_is_low else (high, low)
    across = [int(x) for x in rng.integers(self.cells, size=2)]
    cells = tuple(
      (a, b) if axis == 0 else (b, a)
      for a, b in zip(along, across, strict=True)
    )
    rest = [p for p in pairs if p not in (first, second)]
    total = int(rng.integers(2, self.max_objects + 1))
    names = " ".join(first), " ".join(second)
    return Draft(
      f"Is the {names[0]} {relation} the {names[1]}?",
      answer,
      YES_NO,
      stratum,
      {
        "first": names[0],
        "relation": relation,
        "second": names[1],
        "size": self.size,
      },
      [first, second, *_picks(rng, rest, total - 2)],
      cells,
    )

  def _colour(self, rng: np.random.Generator) -> Draft:
    shape = pick(rng, self.shapes)
    choices = tuple(c for c in self.colours if (c, shape) in self._possible)
    answer = pick(rng, choices)
    total = int(rng.integers(1, self.max_objects + 1))
    rest = [p for p in self._possible if p[1] != shape]
    stratum = "1-3 objects" if total <= 3 else "4 or more"
    pairs = [(answer, shape), *_picks(rng, rest, total - 1)]
    text = f"What colour is the {shape}?"
    return Draft(text, answer, choices, stratum, {"shape": shape}, pairs)

  def _compare(self, rng: np.random.Generator) -> Draft:
    colours = [self.colours[i] for i in rng.permutation(len(self.colours))]
    first, second = colours[:2]
    answer = pick(rng, YES_NO)
    stratum = pick(rng, ("by one", "by more"))
    most = min(self.max_count, self.max_objects // 2)
    less, more = pick(
      rng,
      [
        ends
        for ends in itertools.combinations(range(most + 1), 2)
        if (ends[1] - ends[0] == 1) == (stratum == "by one")
      ],
    )
    counts = (more, less) if answer == "yes" else (less, more)
    total = int(rng.integers(less + more, self.max_objects + 1))
    possible = self._possible
    rest = [p for p in possible if p[0] not in (first, second)]
    pairs = _picks(rng, rest, total - less - more)
    for colour, count in zip((first, second), counts, strict=True):
      pairs += _picks(rng, [p for p in possible if p[0] == colour], count)
    return Draft(
      f"Are there more {first} objects than {second} ones?",
      answer,
      YES_NO,
      stratum,
      {"first": first, "second": second},
      pairs,
    )

  # Scenes

  def draw(self, rng: np.random.Generator, kind: str) -> Sample:
    draft: Draft = getattr(self, f"_{kind}")(rng)
    objects = place(rng, draft.pairs, self.size, self.cells, draft.cells)
    return Sample(
      (),
      draft.question,
      draft.answer,
      kind,
      draft.stratum,
      draft.program,
      objects,
      draft.choices,
    )

  def image_sizes(self, sample: Sample) -> tuple[Size, ...]:
    del sample
    return ((self.size, self.size),)

  def render(self, sample: Sample) -> tuple[UInt8[np.ndarray, "..."], ...]:
    return (drawing.scene(sample.objects, self.size, self.size),)


def place(
  rng: np.random.Generator,
  pairs: list[Pair],
  size: int,
  cells: int,
  fixed: tuple[tuple[int, int], ...] = (),
) -> tuple[Object, ...]:
  """Returns objects in different cells of a grid, of random size and jitter.

  Args:
    rng: of cells, sizes and jitter.
  """
  free = [
    (column, row)
    for row in range(cells)
    for column in range(cells)
    if (column, row) not in fixed
  ]
  order = rng.permutation(len(free))
  where = [*fixed, *(free[i] for i in order)]
  cell = size // cells
  objects = []
  for (colour, shape), (column, row) in zip(pairs, where, strict=False):
    side = int(rng.integers(-(-cell * 6 // 10), cell * 9 // 10 + 1))
    left = column * cell + int(rng.integers(cell - side + 1))
    top = row * cell + int(rng.integers(cell - side + 1))
    box = (left, top, left + side, top + side)
    objects.append(Object(shape, colour, box))
  # What the question names comes first: the order must not say so.
  return tuple(objects[i] for i in rng.permutation(len(objects)))


def _matches(pair: Pair, program: dict[str, str | int]) -> bool:
  named = zip(("colour", "shape"), pair, strict=True)
  return all(program.get(part, found) == found for part, found in named)


def _picks(rng: np.random.Generator, values, count: int) -> list:
  return [pick(rng, values) for _ in range(count)]
