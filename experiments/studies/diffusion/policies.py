"""Quality of text against the number of model calls, for every policy.

On a Markov chain, sampled at temperature 1, a row's likelihood is known, and so
are the pairs it should be made of: policies that only write what is likely are
distinguished from those that sample. They are asked of the chain's own
conditionals (`truth.Chain`), where all errors are the sampler's, and
of trained models. On `Sums`, decoded greedily, answers are right or wrong; what
they cost is counted and measured there, too: FLOPs and seconds of a batch,
whose rows wait for the slowest of them.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies.diffusion import policy_verdicts as judged
from experiments.studies.diffusion import tasks, truth
from experiments.studies.diffusion.study import (
  DiffusionStudy,
  Tiny,
)
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.data.sources.synthetic import Markov
from research.diffusion.sampling import ancestral, sampler
from research.diffusion.sampling.ancestral import Ancestral
from research.diffusion.sampling.classifier_free_guidance import (
  ClassifierFreeGuidance,
  with_prompt,
)
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.credit import Credited
from research.diffusion.sampling.denoiser import Denoiser, NoCache
from research.diffusion.sampling.policies import (
  Factor,
  Hierarchy,
  Quota,
  Threshold,
)
from research.diffusion.sampling.remask import Remask
from research.generation.sampling import GREEDY, Sampling, row_keys
from research.planning import flops
from research.typing import Bool, Int, Params, UserError

SELECTS = {
  "low confidence": "candidate",
  "largest probability": "max",
  "margin": "margin",
  "entropy": "entropy",
  "random": "random",
}
"""Names of the ways to choose a quota of places -> `SamplerConfig.select`."""

ANY = Sampling(temperature=1.0)


class PolicySetting(NamedTuple):
  """One policy at one speed.

  Fields: name and knob, of the table; how, of `filled`; around, which makes
  the denoiser that is asked of the model's.
  """

  name: str
  knob: Any
  how: SamplerConfig | Ancestral | None
  around: Callable[[Denoiser], Denoiser] = lambda denoiser: denoiser


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policies(DiffusionStudy):
  """Every policy at several speeds.

  Attributes:
    chain: what is sampled; the mask is one more id.
    sums: what is answered.
    tiny: the model of either.
    steps: of training.
    seeds: of models, and of what is drawn.
    rows: that are sampled, of each policy.
    speeds: tokens a step, of policies with a quota.
    thresholds, factors, lows: of the policies without.
    longer: steps of ReMDM, in row lengths.
    edit: what editing asks of another token, beside each threshold.
    guidance: weight, of sums, which have a prompt.
  """

  chain: Markov
  sums: tasks.Sums = tasks.Sums()
  tiny: Tiny = Tiny()
  steps: int = 2000
  seeds: int = 3
  rows: int = 256
  speeds: Sequence[int] = (1, 2, 4, 8)
  thresholds: Sequence[float] = (0.5, 0.7, 0.9)
  factors: Sequence[float] = (0.5, 1.0, 2.0)
  lows: Sequence[float] = (0.4, 0.62)
  longer: Sequence[int] = (1, 2, 4)
  edit: float = 0.9
  guidance: float = 1.0

  @property
  def arms(self) -> list[str]:
    """The chain itself and models, of each seed."""
    return [f"{t}, seed {s}" for s in range(self.seeds) for t in judged.TASKS]

  def run(self, arm: str, before: Rows, shared: Any) -> Row:
    """Returns a point for each policy and speed."""
    del before, shared
    task, seed = arm.split(", seed ")
    if task == judged.EXACT:
      chain = truth.Chain(mask_id=self.chain.vocab)
      params = truth.tables(self.chain, self.chain.length)
      return {"points": self._chain(chain, params, int(seed))}
    if task == judged.SUMS:
      learned = tasks.learn_sums(self.sums, self.tiny, self.steps, int(seed))
      return {"points": self._sums(*learned)}
    model, params = tasks.learn_chain(
      self.chain, self.tiny, self.steps, int(seed)
    )
    return {"points": self._chain(NoCache(model=model), params, int(seed))}

  def _chain(self, denoiser: Any, params: Params, seed: int) -> list[Row]:
    length, mask = self.chain.length, self.chain.vocab
    noisy = np.full((self.rows, length), mask, np.int32)
    out = []
    for way in self._ways(mask, length, length):
      asked = way.around(denoiser)
      got, calls = fill(asked, params, noisy, mask, way.how, seed=seed)
      nats = truth.surprise(self.chain, got).mean() / length
      off = truth.off(self.chain, got)
      found = {"nats": float(nats), "off": float(off)}
      out.append(_point(way, calls, length) | found)
    return out

  def _sums(self, model: Any, params: Params) -> list[Row]:
    rows, asked = self.sums.rows("heldout", self.rows), self.sums.answer_mask()
    mask, length = self.sums.mask_id, rows.shape[1]
    noisy = np.where(asked, mask, rows)
    places, out, denoiser = int(asked.sum()), [], NoCache(model=model)
    ways = *self._ways(mask, length, places), *self._guided(mask, asked, length)
    prompt = (jnp.arange(length) < asked.argmax())[None]
    for way in ways:
      if not isinstance(way.how, SamplerConfig) or way.how.select in (
        "max",
        "margin",
      ):
        continue  # the same ones, or for samples alone
      around, own = way.around(denoiser), params
      if isinstance(around, ClassifierFreeGuidance):
        own = with_prompt(params, prompt)
      given = around, own, noisy, mask, way.how, GREEDY
      cost = _flops(around, own, length) / 1e9 / around.passes
      fill(*given)  # compiles
      begin = time.perf_counter()
      got, calls, most = filled(*given)
      seconds = time.perf_counter() - begin
      right = (got == rows)[:, asked]
      found = {"token": float(right.mean()), "row": float(right.all(1).mean())}
      found |= {"GFLOP": most * cost, "ms": 1e3 * seconds / self.rows}
      out.append(_point(way, calls, places) | found)
    return out

  def _ways(
    self, mask: int, length: int, places: int
  ) -> Iterator[PolicySetting]:
    """Yields each policy at each speed."""
    whole = functools.partial(
      SamplerConfig, mask_id=mask, length=length, block=length
    )

    def planned(name, **options):
      for speed in self.speeds:
        steps = -(-places // speed)
        yield PolicySetting(
          name, speed, whole(policy=Quota(), steps=steps, **options)
        )

    for name, select in SELECTS.items():
      yield from planned(name, select=select)
    # By the schedules of Dream and dllm: few places first, or last.
    yield from planned("Dream, entropy", select="entropy", plan="dream")
    yield from planned("cosine", plan="cosine")
    credited = functools.partial(Credited, mask_id=mask)
    for tau in self.thresholds:
      over = Threshold(threshold=tau)
      yield PolicySetting("threshold", tau, whole(policy=over))
      yield PolicySetting("editing", tau, whole(policy=over, edit=self.edit))
      yield PolicySetting(
        "credit", tau, whole(policy=over), lambda inner: credited(inner=inner)
      )
    for factor in self.factors:
      yield PolicySetting("factor", factor, whole(policy=Factor(factor=factor)))
    for low in self.lows:
      yield PolicySetting("hierarchy", low, whole(policy=Hierarchy(low=low)))
    for speed in self.speeds:
      yield PolicySetting(
        "ancestral", speed, Ancestral(steps=-(-length // speed))
      )
    yield PolicySetting("first hitting", 1, None)
    again = Remask(eta=1 / length, start=0.9)
    for times in self.longer:
      how = Ancestral(steps=times * length, remask=again)
      yield PolicySetting("ReMDM", times, how)

  def _guided(
    self, mask: int, asked: Bool[np.ndarray, "T"], length: int
  ) -> Iterator[PolicySetting]:
    """Yields guidance by what stands before the first place asked for."""
    guided = functools.partial(
      ClassifierFreeGuidance, mask_id=mask, weight=self.guidance
    )
    for speed in self.speeds:
      how = SamplerConfig(
        mask_id=mask,
        length=length,
        block=length,
        steps=-(-int(asked.sum()) // speed),
      )
      yield PolicySetting(
        "guidance", speed, how, lambda inner: guided(inner=inner)
      )

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each policy and speed, of all arms."""
    return judged.table(rows, self.seeds)

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what holds of D4 and of the policies."""
    entropy = truth.entropy(self.chain, self.chain.length)
    return judged.verdicts(rows, self.seeds, entropy)

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves policies.png: quality against calls, of all policies."""
    entropy = truth.entropy(self.chain, self.chain.length)
    judged.draw(rows, self.seeds, entropy, folder / "policies.png", title)


def _point(way: PolicySetting, calls: float, places: int) -> Row:
  return {
    "policy": way.name,
    "knob": way.knob,
    "calls": calls,
    "tokens a call": places / calls,
  }


def _flops(denoiser: Denoiser, params: Params, length: int) -> float:
  """Returns FLOPs of a call on one row of which all is asked for."""
  row = jnp.zeros((1, length), jnp.int32)
  return flops.count_flops(
    lambda p: denoiser.prefill(p, row, row == 0, jnp.int32(0), length)[0],
    params,
  )


def fill(*given: Any, **more: Any) -> tuple[Int[np.ndarray, "B T"], float]:
  """Returns the rows of `filled`, and the passes for a row on average."""
  return filled(*given, **more)[:2]


def filled(
  denoiser: Denoiser,
  params: Params,
  noisy: Int[np.ndarray, "B T"],
  mask_id: int,
  how: SamplerConfig | Ancestral | None,
  sampling: Sampling = ANY,
  seed: int = 0,
) -> tuple[Int[np.ndarray, "B T"], float, int]:
  """Returns rows whose masks are filled, passes for a row, and for the batch.

  Args:
    denoiser, params: the model.
    noisy: rows with masks.
    mask_id: of the mask.
    how: a policy; a grid of times; or None for first hitting.
    sampling: of policies; the other two sample at temperature 1.
    seed: of what is drawn.
  """
  masked, key = noisy == mask_id, jax.random.key(seed)
  if isinstance(how, SamplerConfig):
    state = sampler.begin(noisy, masked, np.ones_like(masked), key)
    found = sampler.sample(denoiser, params, state, how, sampling)
    return found.tokens, float(found.counts.mean()), found.calls
  keys = row_keys(key, jnp.arange(len(noisy)))
  tokens, calls = _by_chance(
    denoiser, params, noisy, masked, mask_id, keys, how
  )
  tokens = np.asarray(tokens)
  if (tokens == ancestral.NOTHING).any():
    raise UserError(f"{how or 'first hitting'}: the model's logits are NaN")
  return tokens, float(calls), int(calls)


@functools.partial(jax.jit, static_argnums=(0, 4, 6))
def _by_chance(denoiser, params, noisy, masked, mask, keys, how):
  valid = jnp.ones(noisy.shape, bool)
  length = noisy.shape[1]

  def scores(tokens):
    start = jnp.int32(0)
    return denoiser.prefill(params, tokens, valid, start, length)[0]

  if how is None:
    return ancestral.first_hitting(scores, noisy, masked, mask, keys)
  return ancestral.sample(scores, noisy, masked, mask, keys, how)
