"""How long answers are: ends that come too early, and canvases that grow.

How long answers ought to be is known exactly: they are random walks around a
ring (`tasks.Walks`), and the further the goal, the longer.

`Ends`: rows are fine-tuned with ends up to their full length, so ends are what
a model is surest of: filled first, they grow from the back to the front, and
answers are shorter than those that were learned (LLaDA's appendix on EOS;
research/diffusion/MATH.md 3.2).

`Lengths`: a model says how long an answer will be before it has one: a canvas
that grows (`variable_length`) stops where the model expects an end. Training
cuts batches to random lengths, as LLaDA's now and then does, so that a short
canvas is nothing new.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np

from experiments.core.stats import above, below, either, equivalent, every
from experiments.studies import pictures
from experiments.studies.diffusion.policies import ANY, fill
from experiments.studies.diffusion.study import OfSeeds, Tiny
from experiments.studies.diffusion.tasks import Walks, learn
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.data.batches import batch_of
from research.diffusion.batch_transforms import RandomTruncation
from research.diffusion.sampling import sampler, variable_length
from research.diffusion.sampling.config import Growth, SamplerConfig
from research.diffusion.sampling.denoiser import NoCache
from research.diffusion.sampling.policies import Threshold
from research.generation.sampling import GREEDY
from research.training.reports import plots

WAYS: dict[str, dict[str, Any]] = {
  "low confidence": {},
  "ends last": {"ends": "last"},
  "blocks of 4": {"block": 4},
  "random places": {"select": "random"},
  "largest probability": {"select": "max"},
}
"""Ways to fill an answer -> what is set of `SamplerConfig`."""

GREEDILY = ("low confidence", "ends last", "blocks of 4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ends(OfSeeds):
  """Walks, filled in several ways.

  Attributes:
    walks: what is learned.
    tiny: the model.
    steps: of training.
    rows: answers to each way.
    seeds: of models.
  """

  walks: Walks = Walks()
  tiny: Tiny = Tiny()
  steps: int = 2000
  rows: int = 256

  def run(self, arm: str, before: Rows, shared: Any) -> Row:
    """Returns lengths, and what is valid, by way."""
    del before, shared
    task, seed = self.walks, self.seed(arm)
    learned = np.arange(task.length + 2) > 1
    pool = batch_of(task.rows("train", 8192), learned)
    model, params = learn(
      pool, task.mask_id + 1, self.tiny, self.steps, seed, "learned"
    )
    rows = task.rows("heldout", self.rows)
    noisy = np.where(learned, task.mask_id, rows).astype(np.int32)
    options = functools.partial(
      SamplerConfig, mask_id=task.mask_id, length=task.length, end=(task.end,)
    )
    want = np.array([task.mean_length(int(s), int(g)) for s, g in rows[:, :2]])
    out: Row = {"want": float(want.mean()), "data": self._judged(rows)}
    for name, more in WAYS.items():
      how = options(**({"block": task.length} | more))
      for greedy in (False, True) if name in GREEDILY else (False,):
        got, _ = fill(
          NoCache(model=model),
          params,
          noisy,
          task.mask_id,
          how,
          GREEDY if greedy else ANY,
        )
        out[f"{name}, greedy" if greedy else name] = self._judged(got)
    return out

  def _judged(self, rows: np.ndarray) -> dict[str, float]:
    lengths = self.walks.lengths(rows)
    return {
      "length": float(lengths.mean()),
      "valid": float(self.walks.valid(rows).mean()),
    }

  # --- what the rows say ---

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each way."""
    ways = [way for way in rows[self.arms[0]] if way != "want"]
    return [
      {
        "way": way,
        "mean length": self.mean_of(rows, way, "length"),
        "exactly": self.mean_of(rows, "want").value,
        "valid %": 100 * self.mean_of(rows, way, "valid").value,
      }
      for way in ways
    ]

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what holds of ends."""
    want = self.mean_of(rows, "want").value
    low, last, blocks, chance = (
      self.mean_of(rows, way, "length")
      for way in ("low confidence", "ends last", "blocks of 4", "random places")
    )
    valid = {way: self.mean_of(rows, way, "valid") for way in GREEDILY}
    lost = [
      self.less(rows, (way, "valid"), (GREEDILY[0], "valid"))
      for way in GREEDILY[1:]
    ]
    return [
      Verdict(
        "low confidence ends too early (mean length under 80% of what it is)",
        f"{low} of {want:.2f} tokens",
        below(low, 0.8 * want),
      ),
      Verdict(
        "the model is not to blame: places by chance, and lengths are right"
        " (10%)",
        f"{chance} of {want:.2f}",
        equivalent(chance.over(want), 0.1 * want),
      ),
      Verdict(
        "ends last cures it (mean length within 20%)",
        f"{last} of {want:.2f}",
        equivalent(last.over(want), 0.2 * want),
      ),
      Verdict(
        "so do blocks from left to right",
        f"{blocks} of {want:.2f}",
        equivalent(blocks.over(want), 0.2 * want),
      ),
      Verdict(
        "neither costs valid answers (2%, and most are valid)",
        ", ".join(f"{way}: {x.times(100)}%" for way, x in valid.items()),
        every(
          (
            *(above(x, 0.5) for x in valid.values()),
            *(below(x, 0.02) for x in lost),
          )
        ),
      ),
      self._greedily(rows, want),
    ]

  def _greedily(self, rows: Rows, want: float) -> Verdict:
    """Returns what holds at T = 0, where the likeliest length is no mean."""
    low, *cures = (f"{way}, greedy" for way in GREEDILY)
    length = self.mean_of(rows, low, "length")
    return Verdict(
      "at T = 0 low confidence ends too early, too (80%), and ends last or"
      " blocks make more answers valid",
      f"of {want:.2f} tokens; "
      + ", ".join(
        f"{way}: {self.mean_of(rows, way, 'length')} tokens,"
        f" {self.mean_of(rows, way, 'valid')} valid"
        for way in (low, *cures)
      ),
      every(
        (
          below(length, 0.8 * want),
          either(
            above(self.less(rows, (low, "valid"), (c, "valid"))) for c in cures
          ),
        )
      ),
    )

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves ends.png: mean lengths by way."""
    drawn = plots.figure(8, 3.8)
    axes = drawn.add_subplot()
    lines = [line for line in self.table(rows) if line["way"] != "data"]
    axes.barh(
      [f"{line['way']} ({line['valid %']:.0f}% valid)" for line in lines],
      [line["mean length"].value for line in lines],
      color=plots.style(0)["color"],
    )
    axes.axvline(lines[0]["exactly"], color="0.4", label="exactly")
    axes.invert_yaxis()
    axes.set(xlabel="tokens before the first end, mean", title=title)
    axes.legend(frameon=False)
    plots.save(drawn, folder / "ends.png")


LIKE, NEAR, CLOSE = 0.7, 0.3, 0.05
"""A correlation; a share of a length; a share of answers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths(OfSeeds):
  """Canvases of every question there is, and their answers.

  Attributes:
    walks: what is learned.
    tiny: the model.
    steps: of training.
    growth: of canvases.
    seeds: of models.
  """

  walks: Walks = Walks()
  tiny: Tiny = Tiny()
  steps: int = 3000
  growth: Growth = Growth(start=4, by=2, window=2, ends=0, low_threshold=0.0)

  def run(self, arm: str, before: Rows, shared: Any) -> Row:
    """Returns canvases by distance, and what answers are on them."""
    del before, shared
    task, seed = self.walks, self.seed(arm)
    learned = np.arange(task.length + 2) > 1
    model, params = learn(
      batch_of(task.rows("train", 8192), learned),
      task.mask_id + 1,
      self.tiny,
      self.steps,
      seed,
      "learned",
      (RandomTruncation(chance=1.0),),
    )
    options = SamplerConfig(
      mask_id=task.mask_id,
      length=task.length,
      block=task.length,
      end=(task.end,),
      policy=Threshold(),
    )
    key, given = jax.random.key(0), (NoCache(model=model), params)
    growing = dataclasses.replace(options, canvas=self.growth)
    state = variable_length.start(self.endpoints.tolist(), growing, key)
    grown = variable_length.sample(*given, state, growing, GREEDY)
    state = sampler.start(self.endpoints.tolist(), options, key)
    fixed = sampler.sample(*given, state, options, GREEDY)
    want, alike = self.mean_lengths, 0.0
    if grown.canvas.std() > 0:
      alike = float(np.corrcoef(grown.canvas, want)[0, 1])
    return {
      "canvas": self._by_distance(grown.canvas),
      "want": self._by_distance(want),
      "alike": alike,
      "grown": self._judged(grown),
      "fixed": self._judged(fixed),
    }

  @property
  def endpoints(self) -> np.ndarray:
    """Every start and goal, `[N, 2]`."""
    nodes = range(self.walks.nodes)
    return np.array([(s, g) for s in nodes for g in nodes if s != g])

  @property
  def mean_lengths(self) -> np.ndarray:
    """The mean length of answers to each, exactly."""
    return np.array(
      [self.walks.mean_length(int(s), int(g)) for s, g in self.endpoints]
    )

  @property
  def distances(self) -> np.ndarray:
    """How far each goal is."""
    right = (self.endpoints[:, 1] - self.endpoints[:, 0]) % self.walks.nodes
    return np.minimum(right, self.walks.nodes - right)

  def _by_distance(self, values: np.ndarray) -> list[float]:
    there = np.unique(self.distances)
    return [float(values[self.distances == d].mean()) for d in there]

  def _judged(self, got: sampler.Sampled) -> dict[str, float]:
    return {
      "valid": float(self.walks.valid(got.tokens).mean()),
      "length": float(got.lengths.mean()),
      "calls": float(got.counts.mean()),
    }

  # --- what the rows say ---

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each distance, then for each kind of canvas."""
    out: list[dict[str, Any]] = [
      {
        "goal": int(d),
        "canvas": self.mean_of(rows, "canvas", i),
        "answers, exactly": self.mean_of(rows, "want", i).value,
      }
      for i, d in enumerate(np.unique(self.distances))
    ]
    for kind in ("grown", "fixed"):
      found = {
        k: self.mean_of(rows, kind, k) for k in ("calls", "length", "valid")
      }
      out.append({"filled": kind} | {k: x.value for k, x in found.items()})
    return out

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what holds of a canvas that grows."""
    correlation = self.mean_of(rows, "alike")
    count = len(np.unique(self.distances))
    canvas_, want = (
      [self.mean_of(rows, name, i) for i in range(count)]
      for name in ("canvas", "want")
    )
    saved = self.less(rows, ("grown", "calls"), ("fixed", "calls"))
    lost = self.less(rows, ("grown", "valid"), ("fixed", "valid"))
    return [
      Verdict(
        f"canvases are longer where answers are (correlation surely over"
        f" {LIKE})",
        f"{correlation}",
        above(correlation, LIKE),
      ),
      Verdict(
        f"and as long as answers are on average ({NEAR:.0%}, at each distance)",
        ", ".join(
          f"{a} of {b.value:.2f}" for a, b in zip(canvas_, want, strict=True)
        ),
        every(
          equivalent(a.over(b.value), NEAR * b.value)
          for a, b in zip(canvas_, want, strict=True)
        ),
      ),
      Verdict(
        f"answers take fewer calls than on a canvas of {self.walks.length},"
        " looks for the length included",
        f"{saved} fewer",
        above(saved),
      ),
      Verdict(
        f"and are as often valid (surely less than {CLOSE:.0%} fewer)",
        f"{lost} fewer",
        below(lost, CLOSE),
      ),
    ]

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves lengths.png: canvases, and answers, by distance."""
    drawn = plots.figure(6, 3.6)
    axes = drawn.add_subplot()
    far = np.unique(self.distances)
    found = [self.mean_of(rows, "canvas", i) for i in range(len(far))]
    axes.errorbar(
      far, [x.value for x in found], pictures.halves(found), label="canvas",
      capsize=3,
      **plots.style(0),
    )  # fmt: skip
    axes.plot(
      far, [self.mean_of(rows, "want", i).value for i in range(len(far))],
      label="answers, exactly", **plots.style(1),
    )  # fmt: skip
    axes.set(xlabel="steps to the goal", ylabel="tokens, mean", title=title)
    axes.set_xticks(far)
    axes.legend(frameon=False)
    plots.save(drawn, folder / "lengths.png")
