"""Ends that come too early, and what helps.

Rows are fine-tuned with ends up to their full length, so ends are what a model
is surest of: filled first, they grow from the back to the front, and answers
are shorter than those that were learned (LLaDA's appendix on EOS;
research/diffusion/MATH.md 3.2). How long answers ought to be is known exactly
(`tasks.Walks`).
"""

import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np

from experiments.core.stats import above, below, either, every
from experiments.studies.diffusion.policies import ANY, fill
from experiments.studies.diffusion.study import (
  OfSeeds,
  Tiny,
)
from experiments.studies.diffusion.tasks import Walks, learn
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.data.batches import batch_of
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.denoiser import NoCache
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
        "mean length": self.of(rows, way, "length"),
        "exactly": self.of(rows, "want").value,
        "valid %": 100 * self.of(rows, way, "valid").value,
      }
      for way in ways
    ]

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what holds of ends."""
    want = self.of(rows, "want").value
    low, last, blocks, chance = (
      self.of(rows, way, "length")
      for way in ("low confidence", "ends last", "blocks of 4", "random places")
    )
    valid = {
      way: self.of(rows, way, "valid").value
      for way in ("low confidence", "ends last", "blocks of 4")
    }
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
        abs(chance.value - want) < 0.1 * want,
      ),
      Verdict(
        "ends last cures it (mean length within 20%)",
        f"{last} of {want:.2f}",
        abs(last.value - want) < 0.2 * want,
      ),
      Verdict(
        "so do blocks from left to right",
        f"{blocks} of {want:.2f}",
        abs(blocks.value - want) < 0.2 * want,
      ),
      Verdict(
        "neither costs valid answers (2%, and most are valid)",
        ", ".join(f"{way}: {x:.1%}" for way, x in valid.items()),
        min(valid.values()) > max(0.5, valid["low confidence"] - 0.02),
      ),
      self._greedily(rows, want),
    ]

  def _greedily(self, rows: Rows, want: float) -> Verdict:
    """Returns what holds at T = 0, where the likeliest length is no mean."""
    low, *cures = (f"{way}, greedy" for way in GREEDILY)
    length = self.of(rows, low, "length")
    return Verdict(
      "at T = 0 low confidence ends too early, too (80%), and ends last or"
      " blocks make more answers valid",
      f"of {want:.2f} tokens; "
      + ", ".join(
        f"{way}: {self.of(rows, way, 'length')} tokens,"
        f" {self.of(rows, way, 'valid')} valid"
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
