"""Log-likelihoods of answers by few forward passes, token by token.

A masked diffusion model has no exact log p(answer | prompt); alignment uses
estimates, and a policy and its reference must be estimated with the *same*
masks, or the noise drowns the difference. All estimators have one interface:

  plan(keys, answer) -> Views: masked rows, and what each masked token counts
  tokens [B, T] of estimates = sum over views of counts * log p(token | view)

The mask has no probability, as in the sampler and in the bound. Where tokens
see blocks (`block`), log p is block diffusion's: each block as its view masks
it, after clean ones (LLaDA 2's block bound). Masks of a whole answer are masks
of its blocks: at one time each token is masked by itself.

`full_mask`: the answer all masked, the prompt masked a little (diffu-GRPO,
Zhao et al. 2025, arXiv:2504.12216); biased. `coupled`: that, a random mask, and
its complement, so that every token is seen once in context (Gong et al. 2025,
arXiv:2506.20639). `elbo`: n masks of n counts, whose sum over tokens is an
unbiased bound (Zhu et al. 2025, VRPO, arXiv:2505.19223: one mask for each of n
times is the best use of n passes).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research.diffusion import block as blocks
from research.diffusion import process
from research.diffusion.mask_ratio_time import if_conditioned
from research.diffusion.sampling import denoiser
from research.diffusion.schedule import Linear, Schedule
from research.nn.transformer import Transformer
from research.ranges import Decay, PositiveInt, Ranged
from research.training import positions
from research.typing import (
  Array,
  Bool,
  Float,
  Int,
  Params,
  PRNGKey,
  UserError,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Views:
  """Rows as the model is shown them.

  Attributes:
    masked: bool `[N, B, T]`, for each of N views.
    counts: float32 `[N, B, T]`, zero where nothing is estimated.
    share: float32 `[N, B]`, how likely the process masks a token at each
      view's time, for models that are conditioned on it.
  """

  masked: Any
  counts: Any
  share: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullMask(Ranged):
  """One pass: all of the answer masked.

  Attributes:
    prompt: how likely a token of the prompt is masked, too.
  """

  prompt: Decay = 0.15

  def plan(
    self, keys: PRNGKey, answer: Bool[Array, "B T"], real: Bool[Array, "B T"]
  ) -> Views:
    """Returns one view.

    Args:
      keys: of the rows.
      answer: which tokens are to be scored.
      real: which are no padding.
    """
    rows = answer.shape[0]
    rate = jnp.full((rows, 1), self.prompt)
    hidden = process.mask_each(keys, real & ~answer, rate)
    return Views(
      (answer | hidden)[None],
      answer.astype(jnp.float32)[None],
      jnp.ones((1, rows)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coupled:
  """Three passes: all masked, a mask of ratio r, and its complement.

  Half of log p in the first plus 1/r, or 1/(1 - r), of it in that of the others
  which masks the token: 1.5 log p if all agree, as the authors have it.

  Attributes:
    low, high: r is uniform between them.
  """

  low: float = 0.2
  high: float = 0.8

  def __post_init__(self):
    if not 0 < self.low <= self.high < 1:
      raise UserError(
        f"Coupled: low is {self.low} and high {self.high}, expected "
        "0 < low <= high < 1"
      )

  def plan(self, keys, answer, real):
    """Returns three views; see `FullMask.plan`."""
    del real
    first, second = jax.vmap(jax.random.split, out_axes=1)(keys)
    u = jax.vmap(lambda k: jax.random.uniform(k, (1,)))(first)
    ratio = self.low + (self.high - self.low) * u
    some = process.mask_each(second, answer, ratio)
    rest = answer & ~some
    counts = jnp.stack(
      [
        answer * 0.5,
        jnp.where(some, 0.5 / ratio, 0.0),
        jnp.where(rest, 0.5 / (1 - ratio), 0.0),
      ]
    )
    ratio = ratio[:, 0]
    share = jnp.stack([jnp.ones_like(ratio), ratio, 1 - ratio])
    return Views(jnp.stack([answer, some, rest]), counts, share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Elbo(Ranged):
  """`times` numbers of masks, `masks` sets of each; together unbiased.

  The time of n masks of L is when the n-th token is masked: its share is drawn
  from Beta(n, L - n + 1), whichever tokens they are (see `likelihood`).

  Attributes:
    times: n_t; each number is drawn by itself, uniform on 1..L.
    masks: n_y; more of them is worth less than more times.
  """

  times: PositiveInt = 8
  masks: PositiveInt = 1

  def plan(self, keys, answer, real):
    """Returns `times * masks` views; see `FullMask.plan`."""
    del real
    length = answer.sum(-1)

    def count(key):
      return jax.random.uniform(key, (self.times,))

    u = jax.vmap(count)(jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys))
    each = 1 + jnp.floor(u * length[:, None]).astype(jnp.int32)
    each = jnp.minimum(each, jnp.maximum(length, 1)[:, None])
    masked, counts, share = [], [], []
    for i in range(self.times):
      for j in range(self.masks):
        number = 1 + i * self.masks + j
        now = jax.vmap(lambda k, n=number: jax.random.fold_in(k, n))(keys)
        mask = process.mask_count(now, answer, each[:, i])
        scale = length / each[:, i] / (self.times * self.masks)
        masked.append(mask)
        counts.append(jnp.where(mask, scale[:, None], 0.0))
        moments = process.moments(now, answer)
        share.append(jnp.where(mask, moments, 0.0).max(-1))
    return Views(
      jnp.stack(masked),
      jnp.stack(counts).astype(jnp.float32),
      jnp.stack(share),
    )


Estimator = FullMask | Coupled | Elbo


def estimate(
  model: Transformer,
  params: Params,
  tokens: Int[Array, "B T"],
  valid: Bool[Array, "B T"],
  views: Views,
  mask_id: int,
  shift: bool = False,
  rows: int = 256,
  block: int | None = None,
  schedule: Schedule = Linear(),
) -> Float[Array, "B T"]:
  """Returns the estimates of each token; sum them for the answer's.

  Args:
    model: the network.
    params: its parameters.
    tokens: the truth.
    valid: which are no padding.
    views: from `plan`; the same ones for policy and reference.
    mask_id: of the mask, which has no probability.
    shift: see `denoiser.own_rows`.
    rows: rows of logits held at a time.
    block: tokens of a block of a block-causal model; blocks start at a row's
      first token. None: all see all.
    schedule: of the process, for a model that is conditioned on the time.

  Raises:
    UserError: a block has no tokens.
  """
  if block is not None and block < 1:
    raise UserError(
      f"estimate: block is {block}, expected at least 1, or None: all see all"
    )
  place = denoiser.positions(valid)

  def states(masked, counts, share):
    """Returns the states that predict each token."""
    time = jnp.broadcast_to(schedule.time(share)[:, None], tokens.shape)
    time = if_conditioned(model, time)
    noisy = process.noisy(tokens, masked, mask_id)
    if block is not None:
      # What a view hides of the prompt is hidden of later blocks, too.
      shown = process.noisy(tokens, masked & (counts == 0), mask_id)
      segments = jnp.where(valid, 0, -1)
      both = blocks.copies(noisy, shown, place, segments, block)
      hidden, _ = model.apply(
        {"params": params}, *both, time=blocks.times(time)
      )
      return blocks.predicting(hidden, place, block, shift)
    hidden, _ = model.apply(
      {"params": params},
      noisy,
      place,
      denoiser.visible(None, valid),
      time=time,
    )
    start, length = jnp.int32(0), tokens.shape[1]
    return denoiser.own_rows(hidden, start, length, shift, place)

  def one(total, view):
    _, counts, _ = view
    found = positions.log_probs(
      model, params, states(*view), tokens, rows, excluded=mask_id
    )
    return total + jnp.where(counts > 0, counts * found, 0.0), None

  zero = jnp.zeros(tokens.shape, jnp.float32)
  every = views.masked, views.counts, views.share
  return jax.lax.scan(one, zero, every)[0]
