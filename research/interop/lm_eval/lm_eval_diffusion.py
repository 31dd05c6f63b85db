"""The harness's questions to models that fill in masks.

`loglikelihood` is minus the unbiased estimate of the bound on -log p of the
continuation (Nie et al. 2025, arXiv:2502.09992, appendix B.5, by
`research.diffusion.likelihood`), with guidance if asked for; `rolling` is its
sum over windows, which LLaDA's own evaluation leaves out; `generate_until` is
the sampler's (`diffusion_generate`). A model with blocks is asked block after
block, each given the clean ones before it, so with blocks of one token the
value is exact; what is before a block is read once, by the model's own cache.
"""

import dataclasses
import functools
import types
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.diffusion import likelihood, process
from research.diffusion.sampling import layout
from research.diffusion.sampling.block_causal import BlockCausal
from research.diffusion.sampling.denoiser import NoCache
from research.generation import generate
from research.interop.diffusion.spec import Spec
from research.interop.lm_eval import harness_requests as texts
from research.interop.lm_eval.diffusion_generate import generate_until
from research.interop.lm_eval.lm_eval_settings import (
  DEFAULT,
  DiffusionEvalSettings,
  reading,
  spec_of,
)
from research.interop.loaded import Loaded
from research.text import special_tokens
from research.typing import Array, Bool, Float, Int, Params, PRNGKey, UserError

Pair = tuple[str, str]
Part = tuple[Int[Array, "T"], Bool[Array, "T"], likelihood.Scores]
"""Tokens, which of them are scored, and the model of such rows."""


def loglikelihood(
  loaded: Loaded,
  pairs: Sequence[Pair],
  batch: int = 8,
  settings: DiffusionEvalSettings = DEFAULT,
) -> list[tuple[float, bool]]:
  """Returns (estimate of log p(continuation | context), greedy?) of each.

  Args:
    batch: not used: the rows of a step are samples of one request.
  """
  del batch
  requests = [texts.encoded(loaded.tokenizer, *pair) for pair in pairs]
  return score(loaded, requests, settings)


def rolling(
  loaded: Loaded,
  whole: Sequence[str],
  batch: int = 8,
  settings: DiffusionEvalSettings = DEFAULT,
) -> list[float]:
  """Returns estimates of log p of whole texts, in windows."""
  del batch
  requests, owners = [], []
  for i, text in enumerate(whole):
    # What a window follows is read with it here.
    size = texts.context_of(loaded.model) - 1
    parts = texts.windows(loaded.tokenizer, size, text)
    requests += parts
    owners += [i] * len(parts)
  out = [0.0] * len(whole)
  for owner, (value, _) in zip(
    owners, score(loaded, requests, settings), strict=True
  ):
    out[owner] += value
  return out


def score(
  loaded: Loaded,
  requests: Sequence[texts.Request],
  settings: DiffusionEvalSettings = DEFAULT,
) -> list[tuple[float, bool]]:
  """Returns (estimate of the log-likelihood, greedy?) of token continuations.

  Args:
    requests: (context, continuation), the first not empty; where they are
      longer than the model's context, the first one's beginning is left out.
      An empty continuation has 0.

  Raises:
    UserError: the model has no mask, or a request holds it, or a continuation
      leaves no place for what it follows.
  """
  spec, key = spec_of(loaded), jax.random.key(settings.seed)
  special = special_tokens.from_tokenizer(loaded.tokenizer)
  least = max(1, len(special.row_begin))
  size = texts.context_of(loaded.model)
  out = []
  for i, (context, continuation) in enumerate(requests):
    ids = [*context, *continuation]
    if spec.mask_id in ids:
      raise UserError(
        f"request {i}: contains the mask token, id {spec.mask_id}"
      )
    if len(continuation) > size - least:
      raise UserError(
        f"request {i}: a continuation of {len(continuation)} tokens, expected "
        f"at most {size - least}: the model's context, {size}, less what it "
        "follows"
      )
    ids = special.truncate(ids, size)
    row = _Row(loaded, spec, settings, ids, len(ids) - len(continuation))
    out.append(row.score(jax.random.fold_in(key, i)))
  return out


@dataclasses.dataclass(frozen=True)
class _Row:
  """A context and its continuation, which begins at `first`."""

  loaded: Loaded
  spec: Spec
  settings: DiffusionEvalSettings
  ids: list[int]
  first: int

  def score(self, key: PRNGKey) -> tuple[float, bool]:
    total, greedy = 0.0, self.settings.greedy
    for n, (tokens, target, scores) in enumerate(self.parts()):
      found = likelihood.bound(
        scores,
        tokens,
        target,
        self.spec.mask_id,
        jax.random.fold_in(key, n),
        self.settings.samples,
        self.settings.batch_size,
        self.settings.rounding,
      )
      total -= found.mean
      if greedy:
        best = likelihood.greedy(scores, tokens, target, self.spec.mask_id)
        greedy = bool(best)
    return total, greedy

  def parts(self) -> Iterator[Part]:
    if self.first == len(self.ids):
      return
    if self.spec.block is None:
      yield self.whole()
    else:
      yield from self.blocks()

  def whole(self) -> Part:
    """Returns a model all of whose tokens see each other.

    Rows are padded on the right to few different lengths.
    """
    stop, mask_id = len(self.ids), self.spec.mask_id
    tokens = self._padded(generate.bucket(stop))
    place = jnp.arange(tokens.shape[0])
    denoiser = reading(NoCache, self.loaded, self.spec)
    scores = scores_of(denoiser, self.loaded.params, place < stop, mask_id)
    prompt = place < self.first
    scores = likelihood.guided(scores, prompt, mask_id, self.settings.guidance)
    return tokens, (place >= self.first) & (place < stop), scores

  def blocks(self) -> Iterator[Part]:
    """Yields each block of a model that has some, given those before it."""
    size, stop, w = self.spec.block, len(self.ids), self.settings.guidance
    denoiser = reading(BlockCausal, self.loaded, self.spec, block=size)
    tokens = self._padded(layout.round_up(generate.bucket(stop), size))
    place = jnp.arange(tokens.shape[0])
    prompt = place < self.first
    sides = [tokens]
    if w:
      sides.append(process.noisy(tokens, prompt, self.spec.mask_id))
    memories = [None] * len(sides)
    for start in range(self.first // size * size, stop, size):
      inside = slice(start, start + size)
      own = (place >= max(start, self.first)) & (place < stop)
      # The only target of a block takes one row.
      rows = self.settings.batch_size if own[inside].sum() > 1 else 1
      scores = []
      for i, side in enumerate(sides):
        given = denoiser, self.loaded.params, side
        memories[i] = likelihood.cache_finished(
          *given, jnp.int32(start), memories[i]
        )
        scores.append(
          likelihood.block_scores(
            *given, start, self.spec.mask_id, rows, stop, memories[i]
          )
        )
      guide = prompt[inside], self.spec.mask_id, w
      yield (
        tokens[inside],
        own[inside],
        likelihood.guided(scores[0], *guide, scores[-1]),
      )

  def _padded(self, length: int) -> Int[Array, "T"]:
    tokens = np.zeros(length, np.int32)
    tokens[: len(self.ids)] = self.ids
    return jnp.asarray(tokens)


def scores_of(
  denoiser: NoCache, params: Params, valid: Bool[Array, "T"], mask_id: int
) -> likelihood.Scores:
  """Returns the model of rows alike, compiled, the mask without probability."""
  return functools.partial(_scores, denoiser, params, valid, mask_id)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _scores(
  denoiser: NoCache,
  params: Params,
  valid: Bool[Array, "T"],
  mask_id: int,
  tokens: Int[Array, "B T"],
) -> Float[Array, "B T V"]:
  """Returns logits, the mask's so low that it has no probability."""
  valid = jnp.broadcast_to(valid, tokens.shape)
  logits = denoiser.scores(params, tokens, valid).astype(jnp.float32)
  # Finite, so that guidance can take differences.
  return logits.at[..., mask_id].set(-1e30)


def bound(settings: DiffusionEvalSettings) -> Any:
  """Returns the three questions, asked as `settings` say."""
  return types.SimpleNamespace(
    loglikelihood=functools.partial(loglikelihood, settings=settings),
    rolling=functools.partial(rolling, settings=settings),
    generate_until=functools.partial(generate_until, settings=settings),
  )
