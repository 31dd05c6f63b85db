"""Left to right against diffusion, and all that lies between: what is learned.

The source is a Markov chain, whose entropy is known and whose exact
conditionals would make the bound of every block size tight
(research/diffusion/MATH.md 5): a gap that is left is optimisation or capacity.
A model that predicts the next token, one that fills in masks, and block
diffusion in between have the same parameters, the same rows and the same
optimizer, each at its best of a few rates. A step of block diffusion reads
twice as many tokens: its clean rows.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

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
from experiments.studies.diffusion import bounds
from experiments.studies.diffusion import truth as diffusion_truth
from experiments.studies.diffusion.study import (
  DiffusionStudy,
  Tiny,
  at,
  best_rate,
  marks,
  swept,
  swept_before,
)
from experiments.studies.documents import documents
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.data.batches import batch_of
from research.data.sources.synthetic import Markov
from research.diffusion.block import BlockDiffusion
from research.diffusion.objective import MaskedDiffusion
from research.diffusion.schedule import Linear
from research.training.objectives.objective import NextToken, Objective
from research.training.reports import plots
from research.typing import Params, UserError

AR, WHOLE = "next token", "whole rows"

CLOSE = 0.02
"""Share of the entropy within which two tie, as in `lora_verdicts`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ladder(DiffusionStudy):
  """Next-token prediction, blocks of some sizes, and whole rows.

  Attributes:
    source: the chain; the mask, one more id, also begins rows.
    tiny: the model.
    blocks: of block diffusion, ascending; the row's length is diffusion of
      whole rows, which needs no clean copy.
    steps: of next-token prediction.
    steps_factor: how many times as many tokens diffusion of any kind reads.
    rates: tried, for `trial` steps.
    trial: see `rates`.
    seeds: of weights, order and masks.
    heldout: rows of an evaluation.
    points: of each curve.
  """

  source: Markov
  tiny: Tiny = Tiny()
  blocks: Sequence[int] = (1, 4)
  steps: int = 1000
  steps_factor: int = 6
  rates: Sequence[float] = (1e-3, 3e-3, 1e-2)
  trial: int = 500
  seeds: int = 3
  heldout: int = 128
  points: int = 8

  def __post_init__(self):
    if any(self.source.length % k or k < 1 for k in self.blocks):
      raise UserError(
        f"Ladder.blocks: found {tuple(self.blocks)}, expected divisors of the"
        f" row's length, {self.source.length}"
      )

  @property
  def kinds(self) -> dict[str, int | None]:
    """Kinds of models -> the size of their blocks; None for next token."""
    blocks: dict[str, int | None] = {f"blocks of {k}": k for k in self.blocks}
    return {AR: None, **blocks, WHOLE: self.source.length}

  @property
  def arms(self) -> list[str]:
    """One for each kind and seed, after one for each kind's rates."""
    return swept(self.kinds, self.seeds)

  def run(self, arm: str, before: Rows, shared: Any) -> Row:
    """Returns a curve of gaps to the truth, or the best rate."""
    if arm.startswith("rates of "):
      return self._swept(arm.removeprefix("rates of "))
    kind, seed, rate = swept_before(arm, before)
    curve = self.curve(kind, seed, self._steps(kind), rate)
    return {"kind": kind, "seed": seed, "rate": rate, **curve}

  def _steps(self, kind: str) -> int:
    block = self.kinds[kind]
    if block is None:
      return self.steps
    return self.steps * self.steps_factor // (1 if kind == WHOLE else 2)

  def _swept(self, kind: str) -> Row:
    seed = self.seeds  # a seed that is not reported
    gaps = {
      rate: self.curve(kind, seed, self.trial, rate, points=1)["gap"][-1]
      for rate in self.rates
    }
    rate = best_rate(kind, gaps)
    return {"kind": kind, "gaps": list(gaps.values()), "rate": rate}

  def curve(
    self,
    kind: str,
    seed: int,
    steps: int,
    rate: float,
    points: int | None = None,
  ) -> dict[str, list[Any]]:
    """Returns `read` (tokens so far) and `gap` (nats a token), two lists."""
    model, params = self.tiny.load(self.source.vocab + 1, seed)
    objective = self.objective(kind, model)
    rows = documents(self.source, "train", self.source.count)
    begin = self.source.vocab if kind == AR else None
    pool = batch_of(rows, begin=begin)
    size = self.tiny.batch * self.source.length
    size *= 1 if kind in (AR, WHOLE) else 2
    tried = self.tiny.train(objective, params, pool, steps, seed, rate)
    wanted = marks(steps, self.tiny.every, points or self.points)
    out: dict[str, list[Any]] = {"read": [], "gap": []}
    for done, now in tried:
      if done in wanted:
        out["read"].append(done * size)
        out["gap"].append(self.gap(objective, now, kind))
    return out

  def objective(self, kind: str, model: Any) -> Objective:
    """Returns what a kind of model is trained on."""
    mask, block = self.source.vocab, self.kinds[kind]
    if block is None:
      return NextToken(model=model, rows=2048)
    if kind == WHOLE:
      return MaskedDiffusion(
        model=model,
        mask_id=mask,
        schedule=Linear(),
        spread="even",
        rows=2048,
      )
    return BlockDiffusion(model=model, mask_id=mask, block=block, rows=2048)

  def gap(self, objective: Any, params: Params, kind: str) -> float:
    """Returns the bound less the true -log p, nats a token, held out."""
    rows = documents(self.source, "heldout", self.heldout)
    truth = diffusion_truth.surprise(self.source, np.asarray(rows)).mean()
    block = self.kinds[kind]
    begin = self.source.vocab if block is None else None
    batch = batch_of(rows, begin=begin)
    if block is None:
      found = bounds.loss(objective, params, batch)
    else:
      found = float(bounds.bound(objective, params, batch, block))
    return found - float(truth) / self.source.length

  # --- what the rows say ---

  def gaps(self, rows: Rows, kind: str, read: int | None = None) -> Mean:
    """Returns the mean gap of a kind, at its end, or after `read` tokens."""
    mine = [rows[f"{kind}, seed {s}"] for s in range(self.seeds)]
    return mean([at(row, "gap", read) for row in mine])

  def difference(
    self, rows: Rows, first: str, second: str, read: int | None = None
  ) -> Mean:
    """Returns by how much `first` is further away, after `read` tokens."""

    def of(kind, read):
      return [
        at(rows[f"{kind}, seed {s}"], "gap", read) for s in range(self.seeds)
      ]

    return paired(of(first, read), of(second, None))

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each kind."""
    equal = self.steps * self.tiny.batch * self.source.length
    entropy = diffusion_truth.entropy(self.source, self.source.length)
    out = []
    for kind in self.kinds:
      last = rows[f"{kind}, seed 0"]
      end = self.gaps(rows, kind)
      out.append(
        {
          "kind": kind,
          "rate": last["rate"],
          "tokens read": last["read"][-1],
          "gap, equal FLOPs": self.gaps(rows, kind, equal).value,
          "gap, at the end": end,
          "bound": entropy + end.value,
          "entropy": entropy,
        }
      )
    return out

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what holds of "competitive" (D1), and of the ladder."""
    equal = self.steps * self.tiny.batch * self.source.length
    entropy = diffusion_truth.entropy(self.source, self.source.length)
    short, last = (
      self.difference(rows, WHOLE, AR, equal),
      self.difference(rows, WHOLE, AR),
    )
    nothing = math.log(self.source.vocab) - entropy
    left = self.gaps(rows, WHOLE).times(1 / nothing)
    ladder = [kind for kind in self.kinds if kind != AR]
    said = ", ".join(f"{kind}: {self.gaps(rows, kind)}" for kind in self.kinds)
    found = [
      Verdict(
        "at equal FLOPs diffusion is within 2% of next-token prediction",
        f"behind by {short} of {entropy:.3f} nats a token",
        below(short, CLOSE * entropy),
      ),
      Verdict(
        f"with {self.steps_factor} times the tokens read it is",
        f"behind by {last}",
        below(last, CLOSE * entropy),
      ),
      Verdict(
        "it has learned the source: under 10% of a uniform guess's gap is left",
        f"{left.times(100)}% of {nothing:.3f} nats",
        below(left, 0.1),
      ),
      Verdict(
        "larger blocks are further from the source",
        said,
        every(
          above(self.difference(rows, b, a))
          for a, b in zip(ladder, ladder[1:], strict=False)
        ),
      ),
    ]
    if 1 in self.blocks:
      one = self.difference(rows, "blocks of 1", AR)
      found.append(
        Verdict(
          "blocks of one token learn what next-token prediction does (0.01)",
          f"behind by {one}",
          equivalent(one, 0.01),
        )
      )
    return found

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves curves.png: gaps against tokens read."""
    drawn = plots.figure(7, 4.2)
    axes = drawn.add_subplot()
    runs = {
      kind: [rows[f"{kind}, seed {s}"] for s in range(self.seeds)]
      for kind in self.kinds
    }
    pictures.curves(axes, runs, "read", "gap")
    axes.set(
      xscale="log",
      yscale="log",
      xlabel="tokens through the model, of training",
      ylabel="bound less the truth, nats a token",
      title=title,
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    plots.save(drawn, folder / "curves.png")
