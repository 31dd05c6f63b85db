"""A model of next tokens, converted, and taught to follow instructions.

The base has learned, by next-token prediction, texts of two parts, the second
one a rearrangement of the first, without being given which. Converted
(`convert.converted`) it fills in masks; fine-tuned as LLaDA is, prompts clean,
it is given which rearrangement is expected. It is graded on prompts that it has
not seen, before and after, and beside a model that had no base.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from experiments.core.stats import above
from experiments.studies import pictures
from experiments.studies.diffusion import bounds
from experiments.studies.diffusion.policies import fill
from experiments.studies.diffusion.study import (
  OfSeeds,
  Tiny,
)
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.data.batches import batch_of
from research.data.sources import Split
from research.data.sources.synthetic import rng_of
from research.diffusion.objective import MaskedDiffusion
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.denoiser import NoCache
from research.diffusion.schedule import Linear
from research.generation.sampling import GREEDY
from research.interop.diffusion import from_autoregressive
from research.training.objectives.objective import NextToken
from research.typing import Bool, Int, UserError

BEFORE, AFTER, ALONE = "converted", "converted, tuned", "no base, tuned"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orders:
  """`how x x x x | y y y y`: y is x as it is, turned round, or moved by one.

  Attributes:
    symbols: of x and y; then the three words for how, one for nothing, and `|`.
    length: of x and y.
    seed: of the documents.
  """

  symbols: int = 12
  length: int = 6
  seed: int = 0

  def __post_init__(self):
    if self.symbols < 2 or self.length < 2:
      raise UserError(
        f"Orders: symbols is {self.symbols} and length {self.length}, expected"
        " at least 2"
      )

  @property
  def vocab(self) -> int:
    """Ids, without a mask."""
    return self.symbols + 5

  def rows(
    self, split: Split, count: int, instructed: bool
  ) -> Int[np.ndarray, "N T"]:
    """Returns so many rows; the word for nothing unless they are instructed."""
    rng = rng_of(self.seed, split)
    x = rng.integers(0, self.symbols, (count, self.length))
    how = rng.integers(0, 3, (count, 1))
    ways = [x, x[:, ::-1], np.roll(x, 1, axis=1)]
    y = np.choose(how, ways)
    word = self.symbols + (how if instructed else np.full_like(how, 3))
    between = np.full_like(how, self.symbols + 4)
    return np.concatenate([word, x, between, y], axis=1).astype(np.int32)

  def learned(self) -> Bool[np.ndarray, " T"]:
    """Returns where y is."""
    return np.arange(2 * self.length + 2) > self.length + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Following(OfSeeds):
  """A base, its conversion, and fine-tuning.

  Attributes:
    orders: the texts.
    tiny: the model.
    base_steps: of the base.
    steps: of fine-tuning.
    rows: held out.
    seeds: of all.
  """

  orders: Orders = Orders()
  tiny: Tiny = Tiny()
  base_steps: int = 2000
  steps: int = 1000
  rows: int = 256

  def run(self, arm: str, before: Rows, shared: Any) -> Row:
    """Returns loss and share of right answers, by model."""
    del before, shared
    task, seed = self.orders, self.seed(arm)
    model, fresh = self.tiny.load(task.vocab, seed)
    pool = batch_of(task.rows("train", 8192, instructed=False))
    text = NextToken(model=model, rows=2048)
    base = self.tiny.trained(text, fresh, pool, self.base_steps, seed)
    grown, started, spec = from_autoregressive.to_diffusion(model, base)
    objective = MaskedDiffusion(
      model=grown,
      mask_id=spec.mask_id,
      schedule=Linear(),
      noise="learned",
      norm="sequence",
      spread="even",
      shift=True,
      rows=2048,
    )
    _, nothing = self.tiny.load(task.vocab + 1, seed)
    tuning = batch_of(task.rows("train", 8192, instructed=True), task.learned())

    def tuned(params):
      return self.tiny.trained(objective, params, tuning, self.steps, seed)

    return {
      BEFORE: self._graded(objective, started),
      AFTER: self._graded(objective, tuned(started)),
      ALONE: self._graded(objective, tuned(nothing)),
    }

  def _graded(self, objective: Any, params: Any) -> dict[str, float]:
    """Returns the held-out loss, nats a token, and what is right."""
    task = self.orders
    rows = task.rows("heldout", self.rows, instructed=True)
    learned = task.learned()
    noisy = np.where(learned, objective.mask_id, rows).astype(np.int32)
    length = rows.shape[1]
    options = SamplerConfig(
      mask_id=objective.mask_id, length=length, block=length
    )
    denoiser = NoCache(model=objective.model, shift=True)
    got, _ = fill(denoiser, params, noisy, objective.mask_id, options, GREEDY)
    # Each row's answer, many times masked.
    batch = batch_of(np.tile(rows, (8, 1)), learned)
    loss = bounds.loss(
      dataclasses.replace(objective, norm="token"), params, batch
    )
    right = (got == rows)[:, learned]
    return {
      "loss": loss,
      "token": float(right.mean()),
      "right": float(right.all(1).mean()),
    }

  # --- what the rows say ---

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each model."""
    return [
      {
        "model": kind,
        "loss": self.mean_of(rows, kind, "loss"),
        "right %": self.mean_of(rows, kind, "right").times(100),
      }
      for kind in (BEFORE, AFTER, ALONE)
    ]

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what holds of D3."""

    def difference(a, b, name):
      return self.less(rows, (b, name), (a, name))

    return [
      Verdict(
        "fine-tuned, a converted model follows instructions better: loss",
        f"lower by {difference(BEFORE, AFTER, 'loss')} nats a token",
        above(difference(BEFORE, AFTER, "loss")),
      ),
      Verdict(
        "and graded answers",
        f"{self.mean_of(rows, BEFORE, 'right')} before,"
        f" {self.mean_of(rows, AFTER, 'right')} after",
        above(difference(AFTER, BEFORE, "right")),
      ),
      Verdict(
        "it follows them (90% of answers are right)",
        f"{self.mean_of(rows, AFTER, 'right')}",
        above(self.mean_of(rows, AFTER, "right"), 0.9),
      ),
      Verdict(
        "what the base knew from left to right is of use: without it less is"
        " right",
        f"{self.mean_of(rows, ALONE, 'right')}, so"
        f" {difference(AFTER, ALONE, 'right')} less",
        above(difference(AFTER, ALONE, "right")),
      ),
    ]

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves following.png: loss and right answers, by model."""
    panels = {
      label: {k: self.mean_of(rows, k, name) for k in (BEFORE, AFTER, ALONE)}
      for name, label in (
        ("loss", "held-out loss, nats a token"),
        ("right", "share of right answers"),
      )
    }
    pictures.bar_panels(folder / "following.png", title, panels, (9.0, 3.0))
