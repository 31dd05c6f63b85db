"""The toys of `colab/llada.ipynb`: a chain that is masked, learned, filled in.

The chain is a `synthetic.Markov`, so its entropy is known, and so is what a
perfect model would say (`diffusion_truth`); states are shown as letters.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.core.from_scratch import FromScratch
from experiments.notebooks import diffusion_truth
from research.data.batches import batch_of
from research.data.sources.infilling import Pairs
from research.data.sources.synthetic import Markov
from research.diffusion import process
from research.diffusion.block import BlockDiffusion
from research.diffusion.objective import MaskedDiffusion
from research.diffusion.recall import Recall
from research.diffusion.sampling import sampler
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.denoiser import BlockCache, Denoiser, NoCache
from research.diffusion.sampling.policies import Policy, Threshold
from research.generation.sampling import Sampling
from research.interop.loaded import Loaded
from research.nn import presets
from research.nn.transformer import Transformer
from research.optim import optim
from research.training import state, step
from research.training.objectives.objective import Batch, NextToken, Objective
from research.typing import Float, Int, Params

ANY = Sampling(temperature=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy:
  """A chain, and a Transformer that knows nothing of it yet.

  Attributes:
    source: the chain; the mask is one more id.
  """

  source: Markov = Markov(vocab=10, length=32, concentration=0.15, count=4096)
  steps: int = 2000

  @property
  def mask_id(self) -> int:
    """The token that hides others."""
    return self.source.vocab

  @functools.cached_property
  def network(self) -> tuple[Transformer, Params]:
    loaded = network(self.source.vocab + 1)
    return loaded.model, loaded.params

  @functools.cached_property
  def pool(self) -> dict[str, Any]:
    """All rows to learn from, as a batch."""
    return batch_of(_rows_of(self.source))

  @functools.cached_property
  def truth(self) -> tuple[diffusion_truth.Chain, Params]:
    """The perfect denoiser and its tables."""
    tables = diffusion_truth.tables(self.source, self.source.length)
    return diffusion_truth.Chain(mask_id=self.mask_id), tables

  def rows(self, count: int) -> Int[np.ndarray, "N T"]:
    source = dataclasses.replace(self.source, split="heldout", count=count)
    return _rows_of(source)

  def spelled(self, row: Sequence[int] | np.ndarray) -> list[str]:
    """Returns a letter a token, and a block for the mask."""
    return ["░" if i == self.mask_id else chr(97 + int(i)) for i in row]


def _rows_of(source: Any) -> Int[np.ndarray, "N T"]:
  return np.stack([e.tokens for e in source.examples(None)])


def network(vocab: int) -> Loaded:
  """Returns a small Transformer with random weights, for `vocab` ids in all."""
  sizes = presets.Sizes(
    vocab=vocab,
    width=64,
    depth=2,
    heads=4,
    kv_heads=4,
    head_dim=16,
    hidden=128,
    tied=False,
  )
  return FromScratch(sizes=sizes).load()


def trained(
  objective: Objective, params: Params, pool: Batch, steps: int, rows: int = 32
) -> Params:
  """Returns the moving average of weights after training, as one program."""
  tx = optim.adamw(optim.constant(3e-3, 50))
  update = step.make_train_step(objective, tx, average=0.99)
  key, total = jax.random.key(0), pool["tokens"].shape[0]

  def one(now, _):
    at = jax.random.fold_in(jax.random.fold_in(key, 1), now.step)
    chosen = jax.random.randint(at, (rows,), 0, total)
    batch = {name: x[chosen] for name, x in pool.items()}
    return update(now, batch, key)[0], None

  start = state.create(params, ".", tx, average=True)
  run = jax.jit(lambda now: jax.lax.scan(one, now, length=steps)[0])
  return run(start).ema


def reversal(pairs: Pairs, steps: int) -> list[dict[str, Any]]:
  """Returns shares of right answers about pairs, a row for each objective."""
  loaded, mask = network(pairs.words + 3), pairs.words + 2
  pool = batch_of(_rows_of(pairs))
  common = dict(model=loaded.model, rows=2048)
  ways = {
    "next token": (NextToken(**common), Recall(source=pairs)),
    "diffusion": (
      MaskedDiffusion(mask_id=mask, spread="even", **common),
      Recall(source=pairs, mask_id=mask),
    ),
  }
  out = []
  for name, (objective, ask) in ways.items():
    params = trained(objective, loaded.params, pool, steps)
    right = ask(dataclasses.replace(loaded, params=params)).right
    out.append({"model": name} | dict(right))
  return out


def by_count(
  denoiser: Any, params: Params, rows: Int[np.ndarray, "N T"], mask_id: int
) -> Float[np.ndarray, " T"]:
  """Returns the mean cross-entropy of a masked token, by how many are masked.

  The mean over 1, 2, .. T is the bound, a token.

  Args:
    rows: what is masked, each row in one way a number.
  """
  rows = jnp.asarray(rows)
  whole = jnp.ones(rows.shape, bool)

  def one(params, n):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(2), n), len(rows))
    masked = process.mask_count(keys, whole, jnp.full(len(rows), n))
    noisy = process.noisy(rows, masked, mask_id)
    logits = denoiser.scores(params, noisy, whole)
    logp = jax.nn.log_softmax(logits.at[..., mask_id].set(-1e9))
    found = jnp.take_along_axis(logp, rows[..., None], axis=-1)[..., 0]
    return -jnp.where(masked, found, 0).sum() / masked.sum()

  counts = jnp.arange(1, rows.shape[1] + 1)
  f = jax.jit(lambda p: jax.lax.map(lambda n: one(p, n), counts))
  return np.asarray(f(params))


def one_step(
  denoiser: Any,
  params: Params,
  row: Int[np.ndarray, " T"],
  mask_id: int,
  policy: Policy = Threshold(threshold=0.9),
) -> tuple[Int[np.ndarray, " T"], Float[np.ndarray, "T V"]]:
  """Returns a row after one greedy step, and the chances of its places."""
  tokens = jnp.asarray(row)[None]

  @jax.jit
  def run(params):
    logits = denoiser.scores(params, tokens, jnp.ones(tokens.shape, bool))
    chances = jax.nn.softmax(logits.at[..., mask_id].set(-1e9))
    masked = tokens == mask_id
    kept = policy.commit(chances.max(-1), masked, jnp.ones(1, jnp.int32))
    after = jnp.where(kept, chances.argmax(-1), tokens)
    known = jax.nn.one_hot(tokens, chances.shape[-1])
    return after[0], jnp.where(masked[..., None], chances, known)[0]

  after, chances = run(params)
  return np.asarray(after), np.asarray(chances)


def filled(
  denoiser: Denoiser,
  params: Params,
  noisy: Int[np.ndarray, "B T"],
  options: SamplerConfig,
  sampling: Sampling = ANY,
  seed: int = 0,
) -> sampler.Sampled:
  """Returns rows whose masks are filled; the last `options.length` places."""
  masked = np.asarray(noisy) == options.mask_id
  state = sampler.begin(
    noisy, masked, np.ones_like(masked), jax.random.key(seed)
  )
  return sampler.sample(denoiser, params, state, options, sampling)


def by_steps(
  toy: Toy,
  denoiser: Denoiser,
  params: Params,
  steps: Sequence[int],
  selects: Sequence[str],
  count: int = 256,
) -> list[dict[str, Any]]:
  """Returns how good text is that was made in so many steps, all at chance.

  Args:
    toy: whose chain is the truth.
    selects: how places are chosen, see `SamplerConfig`.
  """
  length = toy.source.length
  noisy = np.full((count, length), toy.mask_id)
  out = []
  for select in selects:
    for n in steps:
      options = SamplerConfig(
        mask_id=toy.mask_id, length=length, block=length, steps=n, select=select
      )
      rows = filled(denoiser, params, noisy, options).tokens
      found = diffusion_truth.surprise(toy.source, rows) / length
      out.append(
        {
          "places by": select,
          "steps": n,
          "nats a token": float(found.mean()),
          "pairs off": diffusion_truth.off(toy.source, rows),
        }
      )
  return out


def ladder(toy: Toy, blocks: Sequence[int]) -> list[dict[str, Any]]:
  """Returns the bound of models trained in blocks, a row for each size."""
  model, params = toy.network
  heldout = batch_of(jnp.asarray(toy.rows(256)))
  out = []
  for block in blocks:
    objective = BlockDiffusion(
      model=model, mask_id=toy.mask_id, block=block, rows=2048
    )
    after = trained(objective, params, toy.pool, toy.steps)
    f = jax.jit(objective)
    found = [
      float(f(after, heldout, jax.random.key(i))[0]) / heldout["tokens"].size
      for i in range(8)
    ]
    out.append({"block": block, "bound": float(np.mean(found))})
  return out


def caches(
  toy: Toy, params: Params, around: dict[str, tuple[int, int] | None]
) -> list[dict[str, Any]]:
  """Returns what caches save, and what they change: greedy, a row a cache.

  Args:
    toy: whose held-out rows are continued, from the middle.
    around: name -> tokens before and after a block that are read again; None
      for all.
  """
  model, _ = toy.network
  length = toy.source.length // 2
  noisy = toy.rows(64).copy()
  noisy[:, length:] = toy.mask_id
  options = SamplerConfig(
    mask_id=toy.mask_id,
    length=length,
    block=length // 2,
    policy=Threshold(threshold=0.9),
  )
  out, truth = [], None
  for name, near in around.items():
    if near is None:
      asked, read = NoCache(model=model), 2 * length
    else:
      asked = BlockCache(model=model, before=near[0], after=near[1])
      read = min(sum(near) + options.block, 2 * length)
    got = filled(asked, params, noisy, options, Sampling())
    truth = got.tokens if truth is None else truth
    same = got.tokens[:, length:] == truth[:, length:]
    out.append(
      {
        "cache": name,
        "tokens read a later call": read,
        "calls": got.calls,
        "as without %": 100 * float(same.mean()),
      }
    )
  return out


def mean_losses(
  objectives: Mapping[str, Any], params: Params, batch: dict[str, Any]
) -> list[dict[str, Any]]:
  """Returns the loss of each objective, in nats a token, over eight draws."""
  out = []
  for name, objective in objectives.items():
    f = jax.jit(objective)
    found = [f(params, batch, jax.random.key(i))[:2] for i in range(8)]
    loss = float(np.mean([total / weight for total, weight in found]))
    out.append({"predicts": name, "nats a token": loss})
  return out
