"""What caches of keys and values change: tokens, and how good they are.

A model that sees both ways has no exact cache: filling a place changes what all
others are. Caches of blocks are renewed at a block's first step (Fast-dLLM,
arXiv:2505.22618), so smaller blocks mean newer caches; delayed ones read masks,
and keep what is filled in (dKV-Cache, arXiv:2505.15781). The same rows are
filled with and without, with the same random numbers: samples of a Markov
chain, whose likelihood is known, and `Sums`, which are right or wrong.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.core.stats import Mean, above, below, every, mean, paired
from experiments.studies import pictures
from experiments.studies.diffusion import tasks
from experiments.studies.diffusion import truth as diffusion_truth
from experiments.studies.diffusion.policies import ANY
from experiments.studies.diffusion.study import (
  DiffusionStudy,
  Tiny,
)
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.data.sources.synthetic import Markov
from research.diffusion.sampling import sampler
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.delayed_kv_cache import DelayedKVCache
from research.diffusion.sampling.denoiser import BlockCache, Denoiser, NoCache
from research.diffusion.sampling.prefix_cache import PrefixCache
from research.generation.sampling import GREEDY, Sampling
from research.training.reports import plots
from research.typing import Int, Params, UserError

NONE, PREFIX, DELAYED = "none", "prefix", "delayed"
CHAIN, SUMS = "chain", "sums"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caches(DiffusionStudy):
  """Every cache at every size of blocks.

  Attributes:
    chain, sums: what is filled.
    tiny: the model of either.
    steps: of training.
    seeds: of models.
    rows: that are filled.
    blocks: tokens between renewals; divisors of either's length.
    around: caches -> tokens before and after a block that are read again;
      besides, `prefix` reads all that follows.
    renewals: of delayed caches, calls after which all is read again.
  """

  chain: Markov
  sums: tasks.Sums = tasks.Sums()
  tiny: Tiny = Tiny()
  steps: int = 2000
  seeds: int = 3
  rows: int = 256
  blocks: Sequence[int] = (8, 16)
  around: Mapping[str, tuple[int, int]] = dataclasses.field(
    default_factory=lambda: {
      "dual": (0, 0),
      "vicinity": (4, 4),
    }
  )

  renewals: Sequence[int] = ()

  def __post_init__(self):
    for length in (self.chain.length, 2 * self.sums.length):
      if any(length % k for k in self.blocks):
        raise UserError(
          f"Caches.blocks: found {tuple(self.blocks)}, expected divisors of"
          f" {length}, the length of rows"
        )

  @property
  def arms(self) -> list[str]:
    """A model of each task and seed."""
    return [f"{t}, seed {s}" for s in range(self.seeds) for t in (CHAIN, SUMS)]

  def run(self, arm: str, before: Rows, shared: Any) -> Row:
    """Returns a point for each cache and size of blocks."""
    del before, shared
    task, seed = arm.split(", seed ")
    if task == SUMS:
      learned = tasks.learn_sums(self.sums, self.tiny, self.steps, int(seed))
      truth = self.sums.rows("heldout", self.rows)
      asked, mask = self.sums.answer_mask(), self.sums.mask_id
    else:
      learned = tasks.learn_chain(self.chain, self.tiny, self.steps, int(seed))
      truth = np.zeros((self.rows, self.chain.length), np.int32)
      asked, mask = np.ones(self.chain.length, bool), self.chain.vocab
    model, params = learned
    noisy, out = np.where(asked, mask, truth).astype(np.int32), []
    for block in self.blocks:
      options = SamplerConfig(
        mask_id=mask, length=noisy.shape[1], block=block, select="max"
      )
      plain = None
      for name in (NONE, *self.caches):
        # Samples of a chain, answers to sums.
        how = GREEDY if task == SUMS else ANY
        way = self._way(name, model, mask)
        got = _filled(way, params, noisy, options, how)
        plain = got if plain is None else plain
        point = {
          "cache": name,
          "block": block,
          "read": self._read(name, block, noisy.shape[1]),
          "same": float((got == plain)[:, asked].mean()),
        }
        if task == SUMS:
          point["right"] = float((got == truth)[:, asked].mean())
        else:
          surprise = diffusion_truth.surprise(self.chain, got).mean()
          point["nats"] = float(surprise) / self.chain.length
          point["off"] = diffusion_truth.off(self.chain, got)
        out.append(point)
    return {"points": out}

  @property
  def caches(self) -> list[str]:
    """Names of the caches: those around a block, the smallest first."""
    return [*self.around, PREFIX, *self._delayed]

  @property
  def _delayed(self) -> dict[str, int]:
    """Delayed caches -> calls after which all is read again."""
    return {f"{DELAYED} {n}": n for n in self.renewals}

  def _way(self, name: str, model: Any, mask: int) -> Denoiser:
    """Returns how rows are read."""
    if name == NONE:
      return NoCache(model=model)
    if name == PREFIX:
      return PrefixCache(model=model)
    if name in self._delayed:
      often = self._delayed[name]
      return DelayedKVCache(model=model, mask_id=mask, refresh=often)
    before, after = self.around[name]
    return BlockCache(model=model, before=before, after=after)

  def _read(self, name: str, block: int, length: int) -> float:
    """Returns the tokens that a later call of a block reads, on average."""
    if name == NONE:
      return float(length)
    if name == PREFIX:
      spans = PrefixCache.spans(block, length)
      left = range(block, length + 1, block)
      return float(np.mean([min(n for n in spans if n >= k) for k in left]))
    if name in self._delayed:
      # A mask less each call, and what was just filled; all, every so often.
      often = self._delayed[name]
      return float(np.mean([
        length if i % often == 0 else left - i + 1
        for left in range(block, length + 1, block)
        for i in range(1, block)
      ]))  # fmt: skip
    return float(min(sum(self.around[name]) + block, length))

  # --- what the rows say ---

  def mean_of_point(
    self, rows: Rows, task: str, cache: str, block: int, name: str
  ) -> Mean:
    """Returns a number's mean over seeds."""
    return mean(self._each(rows, task, cache, block, name))

  def _each(self, rows, task, cache, block, name) -> list[float]:
    return [
      next(
        p[name] for p in rows[f"{task}, seed {s}"]["points"]
        if p["cache"] == cache and p["block"] == block
      )
      for s in range(self.seeds)
    ]  # fmt: skip

  def _lost(self, rows, task, name, sign) -> dict[str, Mean]:
    """Returns what each cache costs, seed by seed, at its worst block size."""

    def at(cache, block):
      given = (cache, NONE)[:: -1 if sign < 0 else 1]
      return paired(*(self._each(rows, task, c, block, name) for c in given))

    return {
      cache: max(
        (at(cache, k) for k in self.blocks), key=lambda x: x.value + x.half
      )
      for cache in self.caches
    }

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each cache and size of blocks."""
    out = []
    for block in self.blocks:
      for cache in (NONE, *self.caches):
        line = {"block": block, "cache": cache}
        for task, name, scale in (
          *((CHAIN, "read", 1), (CHAIN, "same", 100), (CHAIN, "nats", 1)),
          *((CHAIN, "off", 1), (SUMS, "same", 100), (SUMS, "right", 100)),
        ):
          found = self.mean_of_point(rows, task, cache, block, name)
          unit = " %" if scale == 100 else ""
          line[f"{task}: {name}{unit}"] = found.times(scale)
        out.append(line)
    return out

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what holds of caches."""
    small, large = self.blocks[0], self.blocks[-1]

    def drift(task, cache, block):
      return 1 - self.mean_of_point(rows, task, cache, block, "same").value

    def steadier(one, other):
      """Returns how many more tokens of the chain stay, seed by seed."""
      return paired(
        *(self._each(rows, CHAIN, *x, "same") for x in (one, other))
      )

    def said(task, block):
      return ", ".join(f"{c}: {drift(task, c, block):.2%}" for c in self.caches)

    right = self._lost(rows, SUMS, "right", -1)
    off = self._lost(rows, CHAIN, "off", 1)
    names, blocks = self.caches, [*self.around, PREFIX]
    return [
      Verdict(
        "no cache is exact: some tokens are others",
        f"chain, blocks of {large}: {said(CHAIN, large)}",
        all(drift(CHAIN, c, large) > 0 for c in names),
      ),
      Verdict(
        "what is right stays right: sums lose under 1% of their tokens",
        ", ".join(
          f"{c}: {x.value:+.2%} ± {x.half:.2%}" for c, x in right.items()
        ),
        every(below(x, 0.01) for x in right.values()),
      ),
      Verdict(
        "samples stay as good: pairs of the chain at most 0.01 further off",
        ", ".join(
          f"{c}: {x.value:+.4f} ± {x.half:.4f}" for c, x in off.items()
        ),
        every(below(x, 0.01) for x in off.values()),
      ),
      Verdict(
        "drift grows with the steps between renewals (chain)",
        f"blocks of {small}: {said(CHAIN, small)}; of {large}:"
        f" {said(CHAIN, large)}",
        every(above(steadier((c, small), (c, large))) for c in blocks),
      ),
      Verdict(
        "what is read again around a block brings tokens back (chain)",
        f"blocks of {large}: {said(CHAIN, large)}",
        every(
          above(steadier((c, large), (names[0], large))) for c in blocks[1:]
        ),
      ),
    ]

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves drift.png: tokens that are others, against tokens of a block."""
    drawn = plots.figure(9, 3.8)
    for axes, task in zip(drawn.subplots(1, 2), (CHAIN, SUMS), strict=True):
      for i, cache in enumerate(self.caches):
        same = [
          self.mean_of_point(rows, task, cache, k, "same") for k in self.blocks
        ]
        axes.errorbar(
          self.blocks,
          [100 - 100 * x.value for x in same],
          [100 * half for half in pictures.halves(same)],
          marker="o",
          markersize=4,
          capsize=2,
          label=cache,
          **plots.style(i),
        )
      axes.set_xscale("log", base=2)
      axes.set(xlabel="tokens of a block", ylabel="other tokens, %", title=task)
      axes.grid(alpha=0.3)
      axes.legend(frameon=False)
    drawn.suptitle(title)
    plots.save(drawn, folder / "drift.png")


def _filled(
  way: Denoiser,
  params: Params,
  noisy: Int[np.ndarray, "B T"],
  options: SamplerConfig,
  sampling: Sampling,
) -> Int[np.ndarray, "B T"]:
  """Returns rows whose masks are filled, block after block."""
  masked = noisy == options.mask_id
  now = sampler.begin(noisy, masked, np.ones_like(masked), jax.random.key(0))
  for start in range(0, noisy.shape[1], options.block):
    at = jnp.int32(start)
    now, *_ = sampler.fill_block(way, params, now, at, options, sampling)
  return np.asarray(now.tokens)
