"""How long an answer will be, which a model says before it has one.

A canvas that grows (`variable_length`) stops where the model expects
an end. On random walks around a ring (`tasks.Walks`) it is known
exactly how long answers to a question are on average: the further the goal, the
longer. Training cuts batches to random lengths, as LLaDA's now and then does,
so that a short canvas is nothing new.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from experiments.core.stats import above, below
from experiments.studies import pictures
from experiments.studies.diffusion.study import (
  OfSeeds,
  Tiny,
)
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
  growth: Growth = Growth(start=4, by=2, window=2, ends=0, low=0.0)

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
    state = variable_length.start(self.asked.tolist(), growing, key)
    grown = variable_length.sample(*given, state, growing, GREEDY)
    state = sampler.start(self.asked.tolist(), options, key)
    fixed = sampler.sample(*given, state, options, GREEDY)
    want, alike = self.wanted, 0.0
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
  def asked(self) -> np.ndarray:
    """Every start and goal, `[N, 2]`."""
    nodes = range(self.walks.nodes)
    return np.array([(s, g) for s in nodes for g in nodes if s != g])

  @property
  def wanted(self) -> np.ndarray:
    """The mean length of answers to each, exactly."""
    return np.array(
      [self.walks.mean_length(int(s), int(g)) for s, g in self.asked]
    )

  @property
  def distances(self) -> np.ndarray:
    """How far each goal is."""
    right = (self.asked[:, 1] - self.asked[:, 0]) % self.walks.nodes
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
        "canvas": self.of(rows, "canvas", i),
        "answers, exactly": self.of(rows, "want", i).value,
      }
      for i, d in enumerate(np.unique(self.distances))
    ]
    for kind in ("grown", "fixed"):
      found = {k: self.of(rows, kind, k) for k in ("calls", "length", "valid")}
      out.append({"filled": kind} | {k: x.value for k, x in found.items()})
    return out

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what holds of a canvas that grows."""
    alike = self.of(rows, "alike")
    count = len(np.unique(self.distances))
    canvas_, want = (
      [self.of(rows, name, i) for i in range(count)]
      for name in ("canvas", "want")
    )
    saved = self.less(rows, ("grown", "calls"), ("fixed", "calls"))
    lost = self.less(rows, ("grown", "valid"), ("fixed", "valid"))
    return [
      Verdict(
        f"canvases are longer where answers are (correlation surely over"
        f" {LIKE})",
        f"{alike}",
        above(alike, LIKE),
      ),
      Verdict(
        f"and as long as answers are on average ({NEAR:.0%}, at each distance)",
        ", ".join(
          f"{a} of {b.value:.2f}" for a, b in zip(canvas_, want, strict=True)
        ),
        all(
          abs(a.value / b.value - 1) < NEAR
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
    found = [self.of(rows, "canvas", i) for i in range(len(far))]
    axes.errorbar(
      far, [x.value for x in found], pictures.halves(found), label="canvas",
      capsize=3,
      **plots.style(0),
    )  # fmt: skip
    axes.plot(
      far, [self.of(rows, "want", i).value for i in range(len(far))],
      label="answers, exactly", **plots.style(1),
    )  # fmt: skip
    axes.set(xlabel="steps to the goal", ylabel="tokens, mean", title=title)
    axes.set_xticks(far)
    axes.legend(frameon=False)
    plots.save(drawn, folder / "lengths.png")
