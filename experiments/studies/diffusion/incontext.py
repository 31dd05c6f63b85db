"""In-context learning, with what is to be learned from before a gap or after.

Every row lists pairs by a mapping of its own (`sources.shots`), so that
only its other pairs say what a key's value is: shots. Models learn the same
rows: one predicts the next token, one fills in masks, and one fills in masks
after it has predicted next tokens (as Dream, arXiv:2508.15487). All are asked
for the last value after n shots. The value in the middle of a row whose n shots
all come after it is where order matters: a model from left to right sees none
of them, and is asked twice, for its guess there, and by scoring the row with
every value in the gap.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.core.stats import (
  Mean,
  above,
  below,
  equivalent,
  every,
  mean,
  paired,
)
from experiments.studies import pictures
from experiments.studies.diffusion import kinds
from experiments.studies.diffusion.kinds import (
  AR,
  CONVERTED,
  DIFFUSION,
  KINDS,
)
from experiments.studies.diffusion.study import (
  DiffusionStudy,
  Tiny,
  over_seeds,
  swept_before,
)
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.data.sources import Split
from research.data.sources.shots import Shots
from research.nn.transformer import Transformer
from research.training.reports import plots
from research.typing import Params

LAST, MIDDLE = "last, shots before it", "middle, shots after it"
STRANGE, SCORED = "last, key not in the row", "middle, every value scored"
EVIDENCE = {LAST: "before", MIDDLE: "after", STRANGE: "none", SCORED: "after"}
"""Ways to ask -> where the shots with the key stand."""

FAR, CLOSE, LEARNED = 0.5, 0.05, 0.9
"""Accuracies: far over chance; differences that count as none; learned."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InContext(DiffusionStudy):
  """The models, and every way to ask.

  Attributes:
    source: the rows; its mask also begins rows of next-token prediction.
    tiny: the model, whose embeddings begin with variance 1: in the residual
      stream smaller ones drown in what the layers add.
    steps: of next-token prediction, and of what is converted after it.
    steps_factor: times as many are those of diffusion from scratch.
    rates: tried by next-token prediction, whose best the converted model
      keeps, and by diffusion; `steps` each.
    shots: pairs before a question, or after it, ascending.
    pool: rows to draw batches from.
    heldout: rows of an evaluation.
    seeds: of weights, order and masks.
  """

  source: Shots = Shots()
  tiny: Tiny = Tiny(batch=64, every=125)
  steps: int = 500
  steps_factor: int = 3
  rates: Sequence[float] = (1e-3, 3e-3, 1e-2)
  shots: Sequence[int] = (1, 2, 4, 8)
  pool: int = 65_536
  heldout: int = 512
  seeds: int = 3

  @property
  def arms(self) -> list[str]:
    """One for each kind and seed, after those for rates."""
    seeds = [f"{kind}, seed {s}" for s in range(self.seeds) for kind in KINDS]
    return [f"rates of {kind}" for kind in (AR, DIFFUSION)] + seeds

  def run(self, arm: str, before: Rows, shared: Any) -> Row:
    """Returns accuracies while it learns and at the end, or the best rate."""
    if arm.startswith("rates of "):
      return self._swept(arm.removeprefix("rates of "))
    kind, seed, rate = swept_before(arm, before, {CONVERTED: AR})
    model, params = self._load(seed)
    steps = self.steps * (self.steps_factor if kind == DIFFUSION else 1)
    if kind == CONVERTED:
      *_, (_, params) = self._train(AR, model, params, steps, seed, rate)
    tried = self._train(kind, model, params, steps, seed, rate)
    curves, params = self._curves(kind, model, tried, "heldout")
    ways = [LAST, STRANGE, MIDDLE] + [SCORED] * (kind == AR)
    right = {
      way: [
        self._right(kind, way, model, params, n, "heldout") for n in self.shots
      ]
      for way in ways
    }
    return {"rate": rate, "right": right, **curves}

  def _swept(self, kind: str) -> Row:
    """Returns the rate that learns soonest: whose curve's mean is highest."""
    seed, found = self.seeds, []  # a seed that is not reported
    for rate in self.rates:
      model, params = self._load(seed)
      tried = self._train(kind, model, params, self.steps, seed, rate)
      curves, _ = self._curves(kind, model, tried, "validation")
      found.append(float(np.mean(curves[LAST])))
    return {"means": found, "rate": self.rates[int(np.argmax(found))]}

  def _load(self, seed: int) -> tuple[Transformer, Params]:
    model, params = self.tiny.load(self.source.mask_id + 1, seed)
    embed = params["embed"]
    return model, {**params, "embed": embed / jnp.std(embed)}

  def _train(
    self, kind: str, model: Transformer, params: Params, *how: Any
  ) -> Iterator[tuple[int, Params]]:
    rows = self.source.rows("train", self.pool)
    pool = kinds.pool(kind, rows, self.source.mask_id)
    return self.tiny.train(kinds.objective(kind, model), params, pool, *how)

  def _curves(
    self,
    kind: str,
    model: Transformer,
    tried: Iterable[tuple[int, Params]],
    split: Split,
  ) -> tuple[Row, Params]:
    """Returns accuracies by tokens read, after the most shots; weights."""
    size = self.tiny.batch * 2 * self.source.pairs
    base = self.steps if kind == CONVERTED else 0
    out: Row = {"read": [], LAST: [], MIDDLE: []}
    for done, params in tried:
      out["read"].append((base + done) * size)
      for way in (LAST, MIDDLE):
        got = self._right(kind, way, model, params, self.shots[-1], split)
        out[way].append(got)
    return out, params

  def _right(
    self,
    kind: str,
    way: str,
    model: Transformer,
    params: Params,
    shots: int,
    split: Split,
  ) -> float:
    """Returns the share of questions whose answer is the likeliest token."""
    source = self.source
    asked = source.questions(EVIDENCE[way], shots, split, self.heldout)
    noisy = np.where(asked.visible, asked.rows, source.mask_id)
    rows, place = jnp.asarray(noisy, jnp.int32), jnp.int32(asked.position)
    if way == SCORED:
      values = source.keys + jnp.arange(source.values)
      # What comes too late for the question says nothing; the value counts.
      counts = jnp.asarray(asked.visible).at[place].set(True)
      found = kinds.scores(model, params, rows, values, place, counts)
      got = values[jnp.argmax(found, axis=0)]
    else:
      got = kinds.answers(model, kind, params, rows, place)
    return float((np.asarray(got) == asked.rows[:, asked.position]).mean())

  def guess(self, way: str, shots: int) -> float:
    """Returns the accuracy of the majority value in context."""
    asked = self.source.questions(EVIDENCE[way], shots, "heldout", self.heldout)
    return float((asked.most_common() == asked.rows[:, asked.position]).mean())

  # --- what the rows say ---

  def accuracy(self, rows: Rows, kind: str, way: str, at: int = -1) -> Mean:
    """Returns an accuracy's mean over seeds, by default after most shots."""
    return mean(self._seeds(rows, kind, "right", way, at))

  def _arms(self, kind: str) -> list[str]:
    return [f"{kind}, seed {s}" for s in range(self.seeds)]

  def _seeds(self, rows: Rows, kind: str, *path: Any) -> list[float]:
    return over_seeds(rows, self._arms(kind), *path)

  def read(self, rows: Rows, kind: str, way: str) -> list[int | None]:
    """Returns tokens read when 90% are right, by seed; None for never."""
    out: list[int | None] = []
    for row in (rows[arm] for arm in self._arms(kind)):
      both = zip(row["read"], row[way], strict=True)
      out.append(next((n for n, x in both if x >= LEARNED), None))
    return out

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each kind and way to ask, in per cent."""
    out = []
    for kind in KINDS:
      for way in rows[f"{kind}, seed 0"]["right"]:
        line: dict[str, Any] = {"model": kind, "asked": way}
        line["rate"] = rows[f"{kind}, seed 0"]["rate"]
        for i, n in enumerate(self.shots):
          line[f"{n} shots"] = self.accuracy(rows, kind, way, i).times(100)
        if way in (LAST, MIDDLE):
          line["tokens to 90%"] = _thousands(self.read(rows, kind, way))
        out.append(line)
    for way in (LAST, MIDDLE):
      line = {"model": "majority value", "asked": way}
      for n in self.shots:
        line[f"{n} shots"] = 100 * self.guess(way, n)
      out.append(line)
    return out

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what holds of D3, after the most shots."""
    chance = 1 / self.source.values

    def difference(first, second):
      a, b = (self._seeds(rows, k, "right", w, -1) for k, w in (first, second))
      return paired(a, b)

    last = {kind: self.accuracy(rows, kind, LAST) for kind in KINDS}
    middle = {kind: self.accuracy(rows, kind, MIDDLE) for kind in KINDS}
    strange = [self.accuracy(rows, kind, STRANGE) for kind in KINDS]
    scored = self.accuracy(rows, AR, SCORED)
    found = []
    for kind, name in ((DIFFUSION, "from scratch"), (CONVERTED, "converted")):
      behind = difference((AR, LAST), (kind, LAST))
      turned = difference((kind, LAST), (kind, MIDDLE))
      found += [
        Verdict(
          f"{name}, diffusion learns in context: far over chance (surely over"
          " 50%)",
          f"{last[kind]} after {self.shots[-1]} shots, chance {chance:.3f}",
          above(last[kind], FAR),
        ),
        Verdict(
          f"{name}, as well as next-token prediction (surely less than 0.05"
          " behind)",
          f"{last[AR]} there, so behind by {behind}",
          below(behind, CLOSE),
        ),
        Verdict(
          f"{name}, with shots after the gap alone (surely over 50%), and as"
          " well as with shots before it",
          f"{middle[kind]}, so behind by {turned}",
          every((above(middle[kind], FAR), below(turned, CLOSE))),
        ),
      ]
    return [
      *found,
      Verdict(
        "next-token prediction guesses there (within 0.05 of chance)",
        f"{middle[AR]}",
        equivalent(middle[AR].over(chance), CLOSE),
      ),
      Verdict(
        "and cannot find the value at all",
        f"{scored}, when it scores the row with each of"
        f" {self.source.values} values",
        equivalent(scored.over(chance), CLOSE),
      ),
      Verdict(
        "it is the row that says it: of a key that is not in it, all guess",
        ", ".join(str(x) for x in strange),
        every(equivalent(x.over(chance), CLOSE) for x in strange),
      ),
    ]

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves incontext.png: accuracy by shots, and by tokens read."""
    drawn = plots.figure(10, 4.4)
    left, right = drawn.subplots(1, 2, sharey=True)
    lines = [(kind, way) for kind in KINDS for way in (LAST, MIDDLE)]
    for i, (kind, way) in enumerate([*lines, (AR, SCORED)]):
      found = [
        self.accuracy(rows, kind, way, j) for j in range(len(self.shots))
      ]
      how = f"{kind}: {way}", plots.style(i)
      pictures.means(left, self.shots, found, *how)
      if way != SCORED:
        read = [n / 1e6 for n in rows[f"{kind}, seed 0"]["read"]]
        each = range(len(read))
        points = [mean(self._seeds(rows, kind, way, j)) for j in each]
        pictures.means(right, read, points, *how)
    for axes in (left, right):
      axes.axhline(1 / self.source.values, color="0.6", linewidth=0.8)
      axes.set(ylim=(0, 1.02))
      axes.grid(alpha=0.3)
    left.set(xlabel="shots", ylabel="right answers", xscale="log")
    left.set_xticks(self.shots, [str(n) for n in self.shots])
    left.minorticks_off()
    below = dict(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    drawn.legend(*left.get_legend_handles_labels(), **below)
    right.set(xlabel=f"million tokens read; {self.shots[-1]} shots")
    drawn.suptitle(title)
    plots.save(drawn, folder / "incontext.png")


def _thousands(counts: Sequence[int | None]) -> str:
  """Returns numbers of tokens for people; a line for never."""
  return ", ".join("-" if n is None else f"{n // 1000}k" for n in counts)
