"""The reversal curse: facts about names, asked in an order not trained.

Half of the pairs are trained in both orders, by two templates, `name IS fact`
and `fact WAS name`; of the others only the first (Berglund et al. 2023,
arXiv:2309.12288). Asked for the name, a model may be given the second template,
or the first one with a gap in front, which only a model that fills in masks can
be; a model from left to right can score every known name instead.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.core.stats import Mean, above, below, every, mean
from experiments.studies.diffusion import kinds
from experiments.studies.diffusion.kinds import AR, DIFFUSION
from experiments.studies.diffusion.study import (
  DiffusionStudy,
  Tiny,
  over_seeds,
)
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.data.sources.synthetic import rng_of
from research.diffusion.sampling import sampler
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.denoiser import NoCache
from research.training.reports import plots
from research.typing import Bool, Int, Params, UserError

ASKED = {
  "fact": "name IS ?",
  "gap": "? IS fact",
  "template, told both": "fact WAS ?, trained both ways",
  "template, told once": "fact WAS ?, trained one way",
  "scored": "? IS fact, every name scored",
}
"""Probes -> how they are asked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
  """Names and facts of several tokens each, all different.

  Attributes:
    count: pairs; the first half are trained in both orders.
    size: tokens of a name, and of a fact.
    words: different tokens, names and facts alike; then IS, WAS, the mask.
    seed: of the pairs.
  """

  count: int = 40
  size: int = 2
  words: int = 30
  seed: int = 0

  def __post_init__(self):
    if self.count < 2 or self.words**self.size < 4 * self.count:
      raise UserError(
        f"Pairs: count is {self.count}, expected 2 to a quarter of the"
        f" {self.words**self.size} names"
      )

  @property
  def mask_id(self) -> int:
    """The mask; it also begins rows."""
    return self.words + 2

  def entities(self) -> Int[np.ndarray, "N 2 S"]:
    """Returns names and facts."""
    rng = rng_of(self.seed, "train")
    chosen = rng.permutation(self.words**self.size)[: 2 * self.count]
    place = self.words ** np.arange(self.size)
    tokens = chosen[:, None] // place % self.words
    return tokens.reshape(self.count, 2, self.size).astype(np.int32)

  def sentences(self, word: int, reverse: bool) -> Int[np.ndarray, "N T"]:
    """Returns all pairs in one order around `IS` (0) or `WAS` (1)."""
    first, second = np.moveaxis(self.entities(), 1, 0)[:: -1 if reverse else 1]
    middle = np.full((self.count, 1), self.words + word, np.int32)
    return np.concatenate([first, middle, second], axis=1)

  def rows(self) -> Int[np.ndarray, "M T"]:
    """Returns what is learned."""
    return np.concatenate(
      [self.sentences(0, False), self.sentences(1, True)[: self.count // 2]]
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reversal(DiffusionStudy):
  """Both kinds of models, and every way to ask.

  Attributes:
    pairs: of names and facts.
    tiny: the model.
    steps: of either kind.
    seeds: of weights and order.
  """

  pairs: Pairs = Pairs()
  tiny: Tiny = Tiny()
  steps: int = 2000
  seeds: int = 3

  @property
  def arms(self) -> list[str]:
    """One for each kind and seed."""
    both, seeds = (AR, DIFFUSION), range(self.seeds)
    return [f"{kind}, seed {s}" for s in seeds for kind in both]

  def run(self, arm: str, before: Rows, shared: Any) -> Row:
    """Returns the share of right answers, by probe."""
    del before, shared
    kind, seed = arm.split(", seed ")
    pairs = self.pairs
    model, fresh = self.tiny.load(pairs.mask_id + 1, int(seed))
    objective = kinds.objective(kind, model)
    pool = kinds.pool(kind, pairs.rows(), pairs.mask_id)
    params = self.tiny.trained(objective, fresh, pool, self.steps, int(seed))
    size, half = pairs.size, pairs.count // 2
    end = np.arange(2 * size + 1) > size
    answer = _continued if kind == AR else _filled
    forward = pairs.sentences(0, False)
    found = {"fact": _right(answer, model, params, forward, end, pairs)}
    turned = _right(answer, model, params, pairs.sentences(1, True), end, pairs)
    found["template, told both"] = turned[:half]
    found["template, told once"] = turned[half:]
    if kind == AR:
      found["scored"] = _scored(model, params, pairs)[half:]
    else:
      front = np.arange(2 * size + 1) < size
      gap = _right(answer, model, params, forward, front, pairs)
      found["gap"] = gap[half:]
    return {"right": {name: float(x.mean()) for name, x in found.items()}}

  # --- what the rows say ---

  def share(self, rows: Rows, kind: str, probe: str) -> Mean | None:
    """Returns the share of right answers over seeds, if this can be asked."""
    arms = [f"{kind}, seed {s}" for s in range(self.seeds)]
    if probe not in rows[arms[0]]["right"]:
      return None
    return mean(over_seeds(rows, arms, "right", probe))

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each way to ask, in per cent."""
    out = []
    for probe, asked in ASKED.items():
      line: dict[str, Any] = {"asked": asked}
      for kind in (AR, DIFFUSION):
        found = self.share(rows, kind, probe)
        line[kind] = None if found is None else found.times(100)
      out.append(line)
    return out

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what holds of D2."""

    def of(kind, probe):
      found = self.share(rows, kind, probe)
      assert found is not None
      return found

    known = [of(k, "fact") for k in (AR, DIFFUSION)]
    both = [of(k, "template, told both") for k in (AR, DIFFUSION)]
    once = [of(k, "template, told once") for k in (AR, DIFFUSION)]
    gap, scored = of(DIFFUSION, "gap"), of(AR, "scored")
    return [
      Verdict(
        "both kinds know the facts, in the order of training (95%)",
        f"{known[0]} and {known[1]}",
        every(above(x, 0.95) for x in known),
      ),
      Verdict(
        "next-token prediction has the curse: trained one way, it does not know"
        " the other",
        f"{once[0]}; trained both ways {both[0]}",
        every((below(once[0], 0.05), above(both[0], 0.95))),
      ),
      Verdict(
        "a gap in front breaks it: diffusion knows the name (95%)",
        f"{gap}",
        above(gap, 0.95),
      ),
      Verdict(
        "a new template does, too (50%)",
        f"{once[1]}; trained both ways {both[1]}",
        above(once[1], 0.5),
      ),
      Verdict(
        "next-token prediction cannot find the name at all",
        f"{scored}, when it scores all {self.pairs.count} names",
        below(scored, 0.05),
      ),
    ]

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves reversal.png: bars by probe."""
    drawn = plots.figure(8, 3.6)
    axes = drawn.add_subplot()
    for i, kind in enumerate((AR, DIFFUSION)):
      found = [self.share(rows, kind, probe) for probe in ASKED]
      at = [j + 0.4 * (i - 0.5) for j, x in enumerate(found) if x is not None]
      heights = [100 * x.value for x in found if x is not None]
      axes.bar(at, heights, 0.38, label=kind, color=plots.style(i)["color"])
    axes.set_xticks(
      range(len(ASKED)),
      [t.replace(", ", ",\n") for t in ASKED.values()],
      fontsize=8,
    )
    axes.set(ylabel="right answers, %", title=title, ylim=(0, 120))
    axes.legend(frameon=False, loc="upper center", ncols=2)
    plots.save(drawn, folder / "reversal.png")


def _right(answer, model, params, rows, asked, pairs) -> Bool[Any, " N"]:
  """Returns which rows' tokens are found again where they are asked for."""
  noisy = np.where(asked, pairs.mask_id, rows)
  return (answer(model, params, noisy, pairs.mask_id) == rows).all(-1)


def _filled(model, params, noisy, mask_id) -> Int[np.ndarray, "N T"]:
  """Returns rows with their masks filled, the surest first."""
  length = noisy.shape[1]
  options = SamplerConfig(mask_id=mask_id, length=length, block=length)
  masked = noisy == mask_id
  state = sampler.begin(noisy, masked, np.ones_like(masked), jax.random.key(0))
  return sampler.sample(NoCache(model=model), params, state, options).tokens


def _continued(model, params, noisy, mask_id) -> Int[np.ndarray, "N T"]:
  """Returns rows with their ends predicted, token after token."""
  padded = jnp.pad(noisy, ((0, 0), (1, 0)), constant_values=mask_id)

  @jax.jit
  def run(params, rows):
    def one(i, rows):
      hidden, _ = model.apply({"params": params}, rows)
      logits = model.apply({"params": params}, hidden, method="logits")
      found = jnp.argmax(logits[:, i - 1, :mask_id], axis=-1)
      here = jnp.where(rows[:, i] == mask_id, found, rows[:, i])
      return rows.at[:, i].set(here.astype(rows.dtype))

    return jax.lax.fori_loop(1, rows.shape[1], one, rows)

  return np.asarray(run(params, jnp.asarray(padded, jnp.int32)))[:, 1:]


def _scored(model, params: Params, pairs: Pairs) -> Bool[Any, " N"]:
  """Returns for which facts the right name is the likeliest of all names."""
  names, facts = np.moveaxis(pairs.entities(), 1, 0)
  middle = np.full((pairs.count, 1), pairs.words, np.int32)
  out = []
  for fact in facts:
    repeated = np.broadcast_to(fact, names.shape)
    rows = np.concatenate([names, middle, repeated], axis=1)
    found = kinds.log_probs(model, params, jnp.asarray(rows))
    out.append(int(np.argmax(found.sum(-1))))
  return np.asarray(out) == np.arange(pairs.count)
