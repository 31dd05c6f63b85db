"""A study of small text on a page: pixels, soft tokens and tiles.

All arms read the same three figures, wherever they stand on the page. They
differ in what the encoder gets: the page reduced to a small view, all of its
pixels in one view, or tiles of it and the small view; and in how many soft
tokens become of that. Tesseract reads the page, and the small view: what their
pixels say.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.core.stats import mean
from experiments.studies import protocol
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from experiments.studies.vlm import base
from experiments.studies.vlm.arms import EVERYTHING, Stage, linear
from experiments.studies.vlm.base import Tiny
from experiments.studies.vlm.tesseract import Tesseract
from research import weights
from research.training.reports import plots
from research.typing import UInt8
from research.vlm.answering import Answers
from research.vlm.evaluation.report import BLIND, REAL, SHUFFLED
from research.vlm.images.plan import Tiling
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.tiling.nanovlm import NanoVLM
from research.vlm.images.tiling.square import Square
from research.vlm.model import Connector
from research.vlm.objective import WithImages
from research.vlm.scenes.sample import Sample
from research.vlm.scenes.text import Text

REDUCED, MORE_TOKENS = "reduced page", "reduced page, more tokens"
WHOLE, FEW_TOKENS = "whole page", "whole page, as few tokens"
TILES = "tiles and reduced page"
PAGE_READER = "tesseract, whole page"
READERS = {PAGE_READER: False, "tesseract, reduced page": True}
"""Arms that are no models, and whether they read the reduced page."""
COLUMNS = {"score": "all", "blind": "blind", "shuffled": "shuffled"}
"""Fields of a row, shares of right answers, and their titles in the table."""

Reader = Callable[[Sequence[UInt8[np.ndarray, "H W 3"]], str], list[str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewArm:
  """What an encoder sees of a page.

  Attributes:
    name: of the arm.
    tiling: cuts the page; its patch and its squares are the model's.
  """

  name: str
  tiling: Square | NanoVLM


def views(size: int = 64, patch: int = 8) -> tuple[ViewArm, ...]:
  """Returns pages reduced to half, whole ones and tiles.

  Args:
    size: width and height of the page, in pixels.
    patch: of the encoder, in pixels; half of it where a small view has as many
      soft tokens as a whole page.
  """
  half = size // 2
  arms = {
    REDUCED: Square(half, patch),
    MORE_TOKENS: Square(half, patch // 2),
    FEW_TOKENS: Square(size, patch, 2),
    WHOLE: Square(size, patch),
    TILES: NanoVLM(longest=size, tile=half, patch=patch, pool=1),
  }
  return tuple(ViewArm(name=name, tiling=x) for name, x in arms.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pages(Tiny):
  """A model whose views are those of a tiling, of `size` pixels.

  Attributes:
    tiling: cuts pages.
    page: width and height of one, in pixels.
  """

  tiling: Tiling
  page: int

  @property
  def views(self) -> int:
    """Views of a page."""
    return self.tiling.plan(self.page, self.page).views

  def tokens(self, connector: Connector) -> int:
    """Returns the number of soft tokens of a page."""
    return self.views * super().tokens(connector)

  def preprocessor(self, connector: Connector) -> Preprocessor:
    """Returns what makes views of a page."""
    del connector
    return Preprocessor(self.tiling)


@dataclasses.dataclass(frozen=True)
class Shared:
  """What models share, made when the first one needs it.

  Attributes:
    task: of the pages that are learned.
    tiny: makes the tokenizer.
  """

  task: Text
  tiny: Tiny

  @functools.cached_property
  def tokenizer(self) -> Any:
    """The tokenizer of the task's texts."""
    return self.tiny.tokenizer(self.task)

  @functools.cached_property
  def samples(self) -> list[Sample]:
    """The samples, with their images."""
    return self.task[:]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallText(protocol.Study):
  """Arms that learn, from scratch, to read small text.

  Attributes:
    variants: how, an arm each for every seed.
    rule: rows by arm, seeds -> verdicts.
    tiny: sizes of the models, and how they are trained.
    steps: of each arm, which train everything.
    size: width and height of a page, in pixels.
    heights: of capitals and figures on the page, in pixels.
    length: characters of a text.
    alphabet: of a text.
    step: a text begins at multiples of so many pixels: of all places, more
      would have to be learned.
    rows: pages that are learned.
    heldout: number of held-out pages.
    reader: reads them without having learned: (images, alphabet) -> texts.
    seeds: of weights and order.
  """

  variants: Sequence[ViewArm]
  rule: Callable[[Rows, int], list[Verdict]]
  tiny: Tiny = Tiny()
  steps: int = 6000
  size: int = 64
  heights: tuple[int, ...] = (6, 8, 10, 12)
  length: int = 3
  alphabet: str = "0123456789"
  step: int = 4
  rows: int = 16_384
  heldout: int = 512
  reader: Reader = Tesseract()
  seeds: int = 3

  def __post_init__(self):
    names = [*READERS, *(x.name for x in self.variants)]
    protocol.distinct(names, "SmallText.variants")

  @property
  def arms(self) -> list[str]:
    """The readers, then one for each seed and variant."""
    seeds = range(self.seeds)
    return [
      *READERS,
      *(f"{x.name}, seed {s}" for s in seeds for x in self.variants),
    ]

  def settings(self, arm: str) -> str:
    """Returns the setup and one arm: others, and seeds, may come and go."""
    if arm in READERS:
      without = ("variants", "rule", "seeds", "tiny", "steps", "rows")
      return f"{protocol.describe(self, *without)}, {arm}"
    setup = protocol.describe(self, "variants", "rule", "seeds", "reader")
    return f"{setup}, {protocol.describe(self._variant(arm)[0])}"

  def _variant(self, arm: str) -> tuple[ViewArm, int]:
    name, seed = arm.rsplit(", seed ", 1)
    (found,) = (x for x in self.variants if x.name == name)
    return found, int(seed)

  def task(self, **changes: Any) -> Text:
    """Returns the task with some fields changed."""
    fields = dict(
      kinds=("line",),
      heights=self.heights,
      length=self.length,
      alphabet=self.alphabet,
      step=self.step,
      width=self.size,
      height=self.size,
      count=self.rows,
    )
    return Text(**(fields | changes))

  def pages(self, variant: ViewArm) -> Pages:
    """Returns the sizes of an arm's model."""
    tiling = variant.tiling
    own = dict(size=tiling.tile, patch=tiling.patch)
    return Pages(**(vars(self.tiny) | own), tiling=tiling, page=self.size)

  def prepare(self, workdir: pathlib.Path) -> Shared:
    """Returns what models share."""
    del workdir
    return Shared(self.task(), self.tiny)

  def run(self, arm: str, before: Rows, shared: Shared) -> Row:
    """Returns the share of texts that are right, by height."""
    del before
    if arm in READERS:
      return self._read(reduced=READERS[arm])
    variant, seed = self._variant(arm)
    tiny, pool = self.pages(variant), variant.tiling.pool
    connector = linear(pool, tiny.width)
    loaded = tiny.load(connector, shared.tokenizer, seed)
    rows = tiny.questions(connector, shared.samples).rows(shared.tokenizer)
    params, loss = tiny.trained(
      WithImages(model=loaded.model),
      loaded.params,
      base.pool_of([rows[i] for i in range(len(rows))]),
      Stage(EVERYTHING, self.steps),
      seed,
    )
    asked = self.task(split="heldout", count=self.heldout)
    answers = Answers(
      questions=tiny.questions(connector, asked), max_new_tokens=self.length + 2
    )
    report = answers(dataclasses.replace(loaded, params=params)).to_json()
    systems = report["line"]["systems"]
    return {
      "answers": report,
      "heights": [
        report[f"line/{height:2d} px"]["systems"][REAL]["score"]
        for height in self.heights
      ],
      "loss": loss,
      "tokens": tiny.tokens(connector),
      "views": tiny.views,
      "parameters": weights.count(params),
      "score": systems[REAL]["score"],
      "blind": systems[BLIND]["score"],
      "shuffled": systems[SHUFFLED]["score"],
    }

  def _read(self, reduced: bool) -> Row:
    """Returns what the reader has right."""
    asked = self.task(split="heldout", count=self.heldout)[:]
    pages = [sample.image for sample in asked]
    if reduced:
      view = Square(self.size // 2, 1)
      pages = [view.views(page).pixels[0] for page in pages]
    found = self.reader(pages, self.alphabet)
    right = np.array([x == y.answer for x, y in zip(found, asked, strict=True)])
    heights = np.array([int(x.program["height"]) for x in asked])
    return {
      "heights": [float(right[heights == x].mean()) for x in self.heights],
      "score": float(right.mean()),
    }

  def summary(self, row: Row) -> str:
    """Returns the share of right answers."""
    return f"{100 * row['score']:.1f}% right"

  # --- what the rows say ---

  def _found(self, rows: Rows) -> dict[str, list[Row]]:
    """Returns rows of each seed, by arm."""
    found = {name: [rows[name]] for name in READERS if name in rows}
    for variant in self.variants:
      arms = [f"{variant.name}, seed {s}" for s in range(self.seeds)]
      if some := [rows[arm] for arm in arms if arm in rows]:
        found[variant.name] = some
    return found

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each arm, in per cent of right answers."""
    out = []
    for name, found in self._found(rows).items():
      shown = _read_once if name in READERS else mean
      line: dict[str, Any] = {"arm": name}
      line |= {x: found[0].get(x, "") for x in ("views", "tokens")}
      for i, height in enumerate(self.heights):
        line[f"{height} px"] = shown([100 * x["heights"][i] for x in found])
      for field, title in COLUMNS.items():
        if field in found[0]:
          line[title] = shown([100 * x[field] for x in found])
      out.append(line)
    return out

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what the rule says."""
    return self.rule(rows, self.seeds)

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves heights.png: right answers by height, a line for each arm."""
    drawn = plots.figure(7, 4)
    axes = drawn.add_subplot()
    for k, (name, found) in enumerate(self._found(rows).items()):
      values = 100 * np.mean([x["heights"] for x in found], axis=0)
      dashed = {"linestyle": "--"} if name in READERS else {}
      axes.plot(self.heights, values, label=name, **(plots.style(k) | dashed))
    axes.set(
      xlabel="height on the page, pixels", ylabel="right, %", title=title
    )
    axes.legend(frameon=False)
    plots.save(drawn, folder / "heights.png")


def _read_once(values: Sequence[float]) -> float:
  """Returns the value of an arm that has no seeds."""
  [value] = values
  return round(value, 1)
