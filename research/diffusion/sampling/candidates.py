"""What a sampling step proposes for each place, how sure it is of it, and how
many places the plan of steps fills.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import weights
from research.diffusion.sampling.config import SamplerConfig, Select
from research.diffusion.schedule import Linear
from research.generation import sampling as samplers
from research.generation.sampling import Sampling
from research.typing import Array, Bool, Float, Int, PRNGKey, UserError


def quota(
  config: SamplerConfig,
  planned: Int[Array, "B"],
  left: Int[Array, "B"],
  i: Int[Array, ""] | int,
  keys: PRNGKey | None = None,
) -> Int[Array, "B"]:
  """Returns how many places each row fills by plan.

  Args:
    config: with the plan.
    planned: masks that a block had at first.
    left: those that it has.
    i: steps of this block so far.
    keys: the rows' random keys for this step; for `"chance"`.
  """
  steps = config.block_steps
  if config.plan == "even":
    return planned // steps + (i < planned % steps)
  shares = jnp.asarray(shares_of(config.plan, steps), jnp.float32)
  share = shares[jnp.minimum(i, steps - 1)]
  if config.remask is not None:
    fill = config.remask.fills(Linear(), *_times(config, i))
    share = jnp.where(i < steps - 1, fill, 1.0)
  if config.plan == "chance":
    # So many of K coins as places are left.
    hit = (_lots(config, keys, 2) < share) & (
      jnp.arange(config.block) < left[:, None]
    )
    return hit.sum(-1, dtype=jnp.int32)
  fills = left * share
  fills = jnp.floor(fills) if config.plan == "dream" else jnp.round(fills)
  return jnp.where(i < steps - 1, fills.astype(jnp.int32), left)


def shares_of(plan: str, steps: int) -> np.ndarray:
  """Returns which share of what is left each step of a plan fills.

  `"linear"` and `"cosine"` are those of noise schedules, to be rounded half to
  even; `"chance"` the linear one, of each place by itself; `"dream"` the linear
  one on Dream's times, from 1 to 0.001, to be rounded down (arXiv:2508.15487).
  What is left at the last step is filled.
  """
  t = 1 - np.arange(steps + 1) / steps
  if plan == "dream":
    t = np.linspace(1, 1e-3, steps + 1)
  elif plan == "cosine":
    t = np.cos(np.pi / 2 * (1 - t))
  elif plan not in ("linear", "chance"):
    raise UserError(f"quotas: shape is {plan!r}, expected linear or cosine")
  return np.append(1 - t[1:-1] / t[:-2], 1.0)


def remasked(
  config: SamplerConfig,
  probability: Float[Array, "B K"],
  filled: Bool[Array, "B K"],
  i: Int[Array, ""] | int,
  keys: PRNGKey,
) -> Bool[Array, "B K"]:
  """Returns which filled places are masked again, by `config.remask`.

  Args:
    config: with `remask`.
    probability: the model's for each place's token when it was filled in.
    filled: which places of the block may be masked again.
    i: steps of this block so far.
    keys: the rows' random keys for this step.
  """
  if config.remask is None:
    return jnp.zeros_like(filled)
  times = _times(config, i)
  sigma = config.remask.sigma(Linear(), *times, probability, filled)
  return (
    filled & (_lots(config, keys, 3) < sigma) & (i < config.block_steps - 1)
  )


def _lots(
  config: SamplerConfig, keys: PRNGKey, use: int
) -> Float[Array, "B K"]:
  """Returns a uniform number for each place, others for each use."""

  def draw(key):
    return jax.random.uniform(jax.random.fold_in(key, use), (config.block,))

  return jax.vmap(draw)(keys)


def _times(
  config: SamplerConfig, i: Int[Array, ""] | int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Returns the process's times before and after step `i` of a block."""
  t = 1 - jnp.float32(i) / config.block_steps
  return t, jnp.maximum(t - 1 / config.block_steps, 0.0)


def without_placeholders(
  logits: Float[Array, "B K V"], params: Any
) -> Float[Array, "B K V"]:
  """Returns logits that give placeholders of images no probability.

  One that is filled in would stand for a feature, not for a word, and the next
  call would read it.

  Args:
    logits: a denoiser's output.
    params: parameters that the denoiser was called with.
  """
  if not isinstance(params, Mapping):
    return logits
  model_params = params.get("params", params)  # of `with_prompt`
  return samplers.exclude(logits, weights.extra_ids(model_params))


def candidates(
  logits: Float[Array, "B K V"],
  keys: PRNGKey,
  config: SamplerConfig,
  sampling: Sampling,
) -> tuple[Int[Array, "B K"], Float[Array, "B K"], Float[Array, "B K"]]:
  """Returns each place's candidate, its confidence, and its probability.

  Args:
    logits: the denoiser's for the places.
    keys: the rows' random keys for this step.
    config, sampling: as for `sample`.
  """
  logits = logits.astype(jnp.float32)
  never = (config.mask_id, *(config.end if config.ends == "never" else ()))
  logits = logits.at[..., jnp.array(never)].set(-jnp.inf)
  rows, size, vocabulary = logits.shape
  flat = samplers.process_logits(logits.reshape(-1, vocabulary), sampling)
  drawn = flat.reshape(logits.shape)
  noise, chance = jax.vmap(jax.random.split, out_axes=1)(keys)
  if sampling.temperature is None:
    tokens = jnp.argmax(drawn, axis=-1)
  else:
    # Of full 32 bits Gumbel noise has no tail beyond 16, as if the temperature
    # were lower (Zheng et al. 2024, arXiv:2409.02908).
    gumbel = jax.vmap(
      lambda k: jax.random.gumbel(k, (size, vocabulary), mode="high")
    )(noise)
    tokens = jnp.argmax(drawn + gumbel, axis=-1)
  logp = jax.nn.log_softmax(drawn if config.tempered else logits, axis=-1)
  token_logp = jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
  probability = jnp.exp(token_logp)
  confidence = _confidence(logp, probability, chance, config.select)
  if config.place_temperature is not None:
    places = jax.vmap(lambda k: jax.random.fold_in(k, 1))(chance)
    draw = jax.vmap(lambda k: jax.random.gumbel(k, (size,), mode="high"))
    confidence = confidence / config.place_temperature + draw(places)
  # A model that is broken is said to be so after the block.
  confidence = jnp.where(jnp.isnan(confidence), -1.0, confidence)
  if config.ends == "last" and config.end:
    ends = jnp.isin(tokens, jnp.array(config.end))
    # Lower than any confidence, but finite: last, not never.
    confidence = jnp.where(
      ends, jnp.minimum(confidence.min() - 1, -1.0), confidence
    )
  return tokens.astype(jnp.int32), confidence, probability


def _confidence(logp, probability, keys, select: Select):
  if select == "candidate":
    return probability
  if select == "max":
    return jnp.exp(logp.max(-1))
  if select == "margin":
    top = jax.lax.top_k(jnp.exp(logp), 2)[0]
    return top[..., 0] - top[..., 1]
  if select == "entropy":
    p = jnp.exp(logp)
    return jnp.where(p > 0, p * logp, 0).sum(-1)
  draw = jax.vmap(lambda k: jax.random.uniform(k, probability.shape[1:]))
  return draw(keys)
