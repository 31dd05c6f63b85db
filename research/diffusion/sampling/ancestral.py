"""Ancestral sampling: every place by its own chance, over a grid of times.

The reverse of masking, from time t to s < t: a masked place is filled with
probability `(alpha_s - alpha_t) / (1 - alpha_t)`, from the model (Sahoo et al.
2024, arXiv:2406.07524; Shi et al. 2024, arXiv:2406.04329). Filled places may be
masked again (`remask`): more steps than places then correct mistakes. The
first-hitting sampler (Zheng et al. 2024, arXiv:2409.02908) draws when the next
place is filled instead, one place a call, which is exact for models that do not
look at the time.

The block loop takes the same steps on its own grid
(`config.SamplerConfig.plan="chance"`).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from research.diffusion import process
from research.diffusion.likelihood import Scores
from research.diffusion.sampling.remask import Remask
from research.diffusion.schedule import Linear, Schedule
from research.ranges import PositiveInt, Ranged
from research.typing import Array, Bool, Float, Int, PRNGKey, UserError

Grid = Literal["uniform", "cosine", "dream"]

NOTHING = -1
"""In place of a token whose logits are not finite: compiled code cannot raise,
who compiles the samplers has to look for it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral(Ranged):
  """A grid of times, and what is masked again on it.

  Attributes:
    steps: number of steps of the grid.
    schedule: noise schedule of the process.
    grid: even in t, or `cos(pi/2 (1 - t))`, whose steps are small near t = 0,
      or even from 1 to 0.001 (Dream's `origin`, arXiv:2508.15487).
    remask: how likely filled places are masked again, or None.
  """

  steps: PositiveInt
  schedule: Schedule = Linear()
  grid: Grid = "uniform"
  remask: Remask | None = None

  def times(self) -> Float[Array, " N"]:
    """Returns the grid, from 1 down to 0, `steps + 1` numbers."""
    t = 1 - jnp.arange(self.steps + 1) / self.steps
    if self.grid == "cosine":
      t = jnp.cos(jnp.pi / 2 * (1 - t))
    elif self.grid == "dream":
      t = jnp.linspace(1, 1e-3, self.steps + 1)
    return t.at[-1].set(0.0).at[0].set(1.0)


def sample(
  scores: Scores,
  tokens: Int[Array, "B T"],
  masked: Bool[Array, "B T"],
  mask_id: int,
  keys: PRNGKey,
  how: Ancestral,
  timed: bool = False,
) -> tuple[Int[Array, "B T"], Int[Array, ""]]:
  """Returns filled rows, and how often the model was asked.

  Args:
    scores: the model; the mask has no probability whatever it says.
    tokens: rows.
    masked: which places are to be filled.
    mask_id: id of the mask.
    keys: random keys of the rows.
    how: the grid.
    timed: whether `scores` takes times `[B]`, those before each step.

  Raises:
    UserError: logits are not finite; within jit, `NOTHING` says so.
  """
  free, grid = masked, how.times()

  def body(i, state):
    tokens, masked, confidence = state
    t, s = grid[i], grid[i + 1]
    now = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, i), 3))(
      keys
    )
    time = (jnp.full(tokens.shape[0], t),) if timed else ()
    logits = scores(process.noisy(tokens, masked, mask_id), *time)
    logp = _logp(logits, mask_id)
    candidate = _draw(now[:, 0], logp)
    chance = jnp.take_along_axis(logp, candidate[..., None], -1)[..., 0]
    again = jnp.zeros_like(masked)
    uniform = jax.vmap(lambda k: jax.random.uniform(k, masked.shape[1:]))
    if how.remask is None:
      fill, _ = how.schedule.transition_probabilities(t, s, jnp.float32(0))
    else:
      fill = how.remask.fills(how.schedule, t, s)
      sigma = how.remask.sigma(how.schedule, t, s, confidence, free & ~masked)
      again = (uniform(now[:, 2]) < sigma) & (i < how.steps - 1)
    # At the end all that is left is filled.
    fill = jnp.where(i == how.steps - 1, 1.0, fill)
    filled = masked & (uniform(now[:, 1]) < fill)
    tokens = jnp.where(filled, candidate, tokens)
    confidence = jnp.where(filled, jnp.exp(chance), confidence)
    return tokens, (masked & ~filled) | again, confidence

  state = tokens, masked, jnp.ones(tokens.shape)
  tokens, _, _ = jax.lax.fori_loop(0, how.steps, body, state)
  return _checked(tokens), jnp.int32(how.steps)


def first_hitting(
  scores: Scores,
  tokens: Int[Array, "B T"],
  masked: Bool[Array, "B T"],
  mask_id: int,
  keys: PRNGKey,
  order: Int[Array, "B T"] | None = None,
  schedule: Schedule | None = None,
) -> tuple[Int[Array, "B T"], Int[Array, ""]]:
  """Returns filled rows, a place a call, and how often the model was asked.

  Times do not matter to a model that does not see them: what is left is a
  random order. One that is conditioned on them is asked when a place is filled:
  with n masks left, the share `1 - alpha` at which the next one is filled is
  the one before times `u^(1/n)`, the largest of n uniform numbers.

  Args:
    scores, tokens, masked, mask_id, keys: as for `sample`.
    order: ranks of the places, lowest first; by default random.
    schedule: noise schedule, if `scores` takes times `[B]`.

  Raises:
    UserError: as for `sample`.
  """
  if order is None:
    first = jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys)
    uniform = jax.vmap(lambda k: jax.random.uniform(k, masked.shape[1:]))
    order = uniform(first)
  order = jnp.where(masked, order, jnp.inf)

  def earlier(share, masked, now):
    u = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 1)))(now)
    return share * (1 - u) ** (1 / jnp.maximum(masked.sum(-1), 1))

  def body(state):
    tokens, masked, i, share = state
    now = jax.vmap(lambda k: jax.random.fold_in(k, i + 1))(keys)
    time = ()
    if schedule is not None:
      share = earlier(share, masked, now)
      time = (schedule.time(share),)
    logits = scores(process.noisy(tokens, masked, mask_id), *time)
    logp = _logp(logits, mask_id)
    candidate = _draw(now, logp)
    ranks = jnp.where(masked, order, jnp.inf)
    here = jnp.argmin(ranks, axis=-1)[:, None] == jnp.arange(tokens.shape[1])
    here &= masked
    return jnp.where(here, candidate, tokens), masked & ~here, i + 1, share

  def any_masked(state):
    return state[1].any()

  state = tokens, masked, jnp.int32(0), jnp.ones(tokens.shape[0])
  tokens, _, calls, _ = jax.lax.while_loop(any_masked, body, state)
  return _checked(tokens), calls


def _logp(logits, mask_id):
  logits = logits.astype(jnp.float32).at[..., mask_id].set(-jnp.inf)
  return jax.nn.log_softmax(logits, axis=-1)


def _draw(keys, logp):
  gumbel = jax.vmap(lambda k: jax.random.gumbel(k, logp.shape[1:], mode="high"))
  drawn = jnp.argmax(logp + gumbel(keys), axis=-1).astype(jnp.int32)
  return jnp.where(jnp.isnan(logp).any(-1), NOTHING, drawn)


def _checked(tokens):
  """Returns rows, if they are known already to be text."""
  if not isinstance(tokens, jax.core.Tracer) and (tokens == NOTHING).any():
    raise UserError(
      "ancestral: logits are not finite numbers; are these the model's weights?"
    )
  return tokens
