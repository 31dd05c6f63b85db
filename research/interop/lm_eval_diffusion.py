"""The harness's questions to models that fill in masks.

`loglikelihood` is minus the unbiased estimate of the bound on -log p of the
continuation (Nie et al. 2025, arXiv:2502.09992, appendix B.5, by
`research.diffusion.likelihood`), with guidance if asked for; `rolling` is its
sum over windows, which LLaDA's own evaluation leaves out; `generate_until` is
the sampler's. A model with blocks is asked block after block, each given the
clean ones before it, so with blocks of one token the value is exact.

`research.interop.lm_eval.adapter` puts them behind the harness's interface.
"""

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.diffusion import layout, likelihood, sampler, told
from research.diffusion.candidates import Options as Filling
from research.diffusion.denoiser import Whole
from research.diffusion.guided import Guided, with_prompt
from research.diffusion.policies import Policy, Quota
from research.diffusion.spec import Spec
from research.interop import lm_eval_requests as texts
from research.interop.load import Loaded
from research.nn import generate, special_tokens
from research.typing import Array, Bool, Float, Int, Params, PRNGKey, UserError

Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
  """How a model that fills in masks is asked.

  Attributes:
    samples: of an estimate; one for targets of a single token.
    spread: rows at once, whose numbers of masks are spread evenly.
    guidance: by the context, w; 0 for none.
    greedy: whether to find out if a continuation is the one that reveals its
      surest token first; it takes a call a token, and is False otherwise.
    block: tokens of a block that is filled; None for the model's own, or 32.
    policy: which candidates are kept.
    seed: of masks and samples; a value depends on it and on the request's
      place.
  """

  samples: int = 128
  spread: int = 16
  guidance: float = 0.0
  greedy: bool = False
  block: int | None = None
  policy: Policy = Quota()
  seed: int = 0


DEFAULT = Asking()


def loglikelihood(
  loaded: Loaded,
  pairs: Sequence[Pair],
  batch: int = 8,
  how: Asking = DEFAULT,
) -> list[tuple[float, bool]]:
  """Returns (estimate of log p(continuation | context), greedy?) of each.

  Args:
    loaded: the model.
    pairs: contexts and continuations.
    batch: not used: the rows of a step are samples of one request.
    how: see `Asking`.
  """
  del batch
  requests = [texts.encoded(loaded.tokenizer, *pair) for pair in pairs]
  return score(loaded, requests, how)


def rolling(
  loaded: Loaded,
  whole: Sequence[str],
  batch: int = 8,
  how: Asking = DEFAULT,
) -> list[float]:
  """Returns estimates of log p of whole texts, in windows.

  Args:
    loaded: the model.
    whole: the texts.
    batch: not used, see `loglikelihood`.
    how: see `Asking`.
  """
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
    owners, score(loaded, requests, how), strict=True
  ):
    out[owner] += value
  return out


def score(
  loaded: Loaded, requests: Sequence[texts.Request], how: Asking = DEFAULT
) -> list[tuple[float, bool]]:
  """Returns (estimate of the log-likelihood, greedy?) of token continuations.

  Args:
    loaded: the model.
    requests: (context, continuation), the first not empty; where they are
      longer than the model's context, the first one's beginning is left out.
      An empty continuation has 0.
    how: see `Asking`.

  Raises:
    UserError: the model has no mask, or a request holds it, or a continuation
      leaves no place for what it follows.
  """
  spec, key = _spec(loaded), jax.random.key(how.seed)
  special = special_tokens.of(loaded.tokenizer)
  least = max(1, len(special.row_begin))
  size = texts.context_of(loaded.model)
  out = []
  for i, (context, continuation) in enumerate(requests):
    ids = [*context, *continuation]
    if spec.mask_id in ids:
      raise UserError(f"request {i}: holds the mask, id {spec.mask_id}")
    if len(continuation) > size - least:
      raise UserError(
        f"request {i}: a continuation of {len(continuation)} tokens, expected "
        f"at most {size - least}: the model's context, {size}, less what it "
        "follows"
      )
    ids = special.truncate(ids, size)
    row = _Row(loaded, spec, how, ids, len(ids) - len(continuation))
    out.append(row.asked(jax.random.fold_in(key, i)))
  return out


@dataclasses.dataclass(frozen=True)
class _Row:
  """A context and its continuation, which begins at `first`."""

  loaded: Loaded
  spec: Spec
  how: Asking
  ids: list[int]
  first: int

  def asked(self, key: PRNGKey) -> tuple[float, bool]:
    total, greedy = 0.0, self.how.greedy
    for n, (start, stop) in enumerate(self.spans()):
      tokens, target, scores = self.span(start, stop)
      found = likelihood.bound(
        scores,
        tokens,
        target,
        self.spec.mask_id,
        jax.random.fold_in(key, n),
        self.how.samples,
        self.how.spread,
      )
      total -= found.mean
      if greedy:
        best = likelihood.greedy(scores, tokens, target, self.spec.mask_id)
        greedy = bool(best)
    return total, greedy

  def spans(self) -> list[tuple[int, int]]:
    """Returns the parts of the continuation that are asked for at once."""
    whole, size = len(self.ids), self.spec.block
    if size is None:
      return [(self.first, whole)] if self.first < whole else []
    out, start = [], self.first
    while start < whole:
      stop = min((start // size + 1) * size, whole)
      out.append((start, stop))
      start = stop
    return out

  def span(self, start: int, stop: int):
    """Returns a row up to `stop`, what is asked of it, and the model.

    Rows are padded on the right to few different lengths.
    """
    length = generate.bucket(stop)
    tokens = np.zeros(length, np.int32)
    tokens[:stop] = self.ids[:stop]
    place = np.arange(length)
    valid = jnp.asarray(place < stop)
    denoiser = _whole(self.loaded, self.spec)
    scores = scores_of(denoiser, self.loaded.params, valid, self.spec.mask_id)
    prompt = jnp.asarray(place < self.first)
    scores = likelihood.guided(
      scores, prompt, self.spec.mask_id, self.how.guidance
    )
    target = jnp.asarray((place >= start) & (place < stop))
    return jnp.asarray(tokens), target, scores


def _whole(loaded: Loaded, spec: Spec) -> Whole:
  return Whole(
    model=loaded.model,
    shift=spec.shift,
    block=spec.block,
    told=told.shares(loaded.model, spec.mask_id),
  )


def scores_of(
  denoiser: Whole, params: Params, valid: Bool[Array, "T"], mask_id: int
) -> likelihood.Scores:
  """Returns the model of rows alike, compiled, the mask without probability."""
  return functools.partial(_scores, denoiser, params, valid, mask_id)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _scores(
  denoiser: Whole,
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


def generate_until(
  loaded: Loaded,
  requests: Sequence[tuple[str, Mapping[str, Any]]],
  batch: int = 8,
  how: Asking = DEFAULT,
) -> list[str]:
  """Returns continuations, cut before the first of some strings.

  Args:
    loaded: the model.
    requests: (context, options), see `lm_eval_requests.options_of`.
    batch: contexts continued at a time.
    how: see `Asking`.
  """
  spec, out = _spec(loaded), [""] * len(requests)
  for options, members in texts.grouped(requests).items():
    for start in range(0, len(members), batch):
      part = members[start : start + batch]
      contexts = [requests[i][0] for i in part]
      made = _filled(loaded, spec, contexts, options, part, how)
      for i, text in zip(part, made, strict=True):
        out[i] = texts.before(text, options.until)
  return out


def _filled(loaded, spec, contexts, options, numbers, how) -> list[str]:
  tokenizer = loaded.tokenizer
  room = max(1, texts.context_of(loaded.model) - options.count)
  prompts = [
    tokenizer.special.truncate(tokenizer.prompt(text), room)
    or [texts.prefix(tokenizer)]
    for text in contexts
  ]
  end = (*spec.end, *(tokenizer.stop or ()))
  end = tuple(sorted({i for i in end if i != spec.mask_id}))
  block = spec.block or how.block or min(32, options.count)
  laid, length = _laid(prompts, options.count, block, spec)
  filling = Filling(
    mask_id=spec.mask_id, length=length, block=block, policy=how.policy, end=end
  )
  key, examples = jax.random.key(how.seed), jnp.asarray(numbers)
  state = sampler.begin(laid.tokens, laid.masked, laid.valid, key, examples)
  denoiser, params = _whole(loaded, spec), loaded.params
  if how.guidance:
    params = with_prompt(params, jnp.asarray(laid.prompt))
    denoiser = Guided(inner=denoiser, mask_id=spec.mask_id, weight=how.guidance)
  rows = sampler.sample(denoiser, params, state, filling, options.rule)
  out = []
  for made, head in zip(rows.tokens, laid.heads, strict=True):
    made = made[head:][: options.count]
    ends = np.flatnonzero(np.isin(made, end))
    made = made[: ends[0]] if ends.size else made
    out.append(tokenizer.decode(made.tolist()))
  return out


def _laid(prompts, count, block, spec) -> tuple[layout.Laid, int]:
  """Returns prompts and masks on a rung, and how many places are filled."""
  layout.check_prompts(prompts, spec.mask_id)
  unit, rows, sizes = spec.block or 1, [], []
  for prompt in prompts:
    # Blocks of a model that has some begin where the row does.
    inside = len(prompt) % unit
    sizes.append(layout.up(inside + count, block))
    rows.append([*prompt, *[spec.mask_id] * (sizes[-1] - inside)])
  longest = max(len(prompt) // unit * unit for prompt in prompts)
  length = max(sizes)
  width = layout.width(longest, length, unit)
  return layout.lay(rows, spec.mask_id, length, width, unit), length


def _spec(loaded: Loaded) -> Spec:
  if loaded.diffusion is None:
    raise UserError(
      f"{loaded.source.get('path', 'the model')}: predicts the next token and "
      "has no mask; research.interop.lm_eval asks such models"
    )
  return loaded.diffusion


def bound(how: Asking) -> Any:
  """Returns the three questions, asked as `how` says."""
  return types.SimpleNamespace(
    loglikelihood=functools.partial(loglikelihood, how=how),
    rolling=functools.partial(rolling, how=how),
    generate_until=functools.partial(generate_until, how=how),
  )
