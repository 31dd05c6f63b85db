"""Sampling from next-token logits: pure functions on `[B, V]`.

Same semantics and order as Hugging Face's logits processors: repetition
penalty, temperature, top-k, top-p, min-p. A row's key is derived from the
example's index and step only, so a sample does not depend on the rest of the
batch.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from research.typing import Array, Bool, Float, Int, PRNGKey, UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """Sampling parameters; None disables a rule.

  The numbers are pytree leaves, so changing them does not recompile.

  Attributes:
    temperature: divides the logits; None for greedy decoding.
    top_p: keeps the smallest set of tokens with at least this mass (Holtzman
      et al. 2019, arXiv:1904.09751); ties at the threshold are all kept.
    min_p: keeps tokens whose probability is at least this fraction of the
      largest one (Nguyen et al. 2024, arXiv:2407.01082).
    repetition_penalty: divides positive logits of tokens already present,
      prompt included, and multiplies negative ones (Keskar et al. 2019,
      arXiv:1909.05858, section 4.1).
    top_k: keeps the `k` most likely tokens.
  """

  temperature: Any = None
  top_p: Any = None
  min_p: Any = None
  repetition_penalty: Any = None
  top_k: int | None = dataclasses.field(
    default=None, metadata=dict(static=True)
  )


GREEDY = Sampling()


def check(sampling: Sampling) -> None:
  """Raises UserError if a parameter of `sampling` is out of range."""
  ranges = {
    "temperature": (lambda x: x > 0, "a number above 0, or none for greedy"),
    "top_p": (lambda x: 0 < x <= 1, "a probability in (0, 1]"),
    "min_p": (lambda x: 0 <= x <= 1, "a ratio in [0, 1]"),
    "repetition_penalty": (lambda x: x > 0, "a factor above 0"),
    "top_k": (lambda x: x == int(x) and x >= 1, "a whole number from 1 on"),
  }
  for name, (good, expected) in ranges.items():
    value = getattr(sampling, name)
    if value is None:
      continue
    try:
      fits = bool(jnp.isfinite(value)) and good(value)
    except TypeError:
      fits = False
    if not fits:
      raise UserError(f"{name}: found {value!r}, expected {expected}")


def row_keys(key: PRNGKey, examples: Int[Array, "B"]) -> PRNGKey:
  """Returns a random key for each example, `[B]`, derived from its index."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(examples)


def exclude(
  logits: Float[Array, "*B V"], ids: Sequence[int]
) -> Float[Array, "*B V"]:
  """Returns logits that give `ids` no probability; those past V have none."""
  for token in ids:
    if token < logits.shape[-1]:
      logits = logits.at[..., token].set(-jnp.inf)
  return logits


def penalize(
  logits: Float[Array, "B V"], occurred: Bool[Array, "B V"], penalty: Any
) -> Float[Array, "B V"]:
  """Returns logits with the repetition penalty applied to `occurred` tokens."""
  less = jnp.where(logits > 0, logits / penalty, logits * penalty)
  return jnp.where(occurred, less, logits)


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
  """Returns logits with -inf below the `k`-th largest; keeps ties."""
  k = min(k, logits.shape[-1])
  least = jax.lax.top_k(logits, k)[0][:, -1:]
  return jnp.where(logits < least, -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "B V"], p: Any) -> Float[Array, "B V"]:
  """Returns logits with -inf outside the nucleus of mass `p`.

  A token is kept iff the total probability of strictly more likely tokens is
  below `p`. The threshold is found by bisection over the bit patterns of
  positive floats, which are ordered like the floats. This is exact and needs no
  sort of the vocabulary, which on a CPU costs more than a layer of the model.
  """
  probabilities = jax.nn.softmax(logits, axis=-1)
  rows = logits.shape[0]

  def halve(_, bounds):
    low, high = bounds  # mass above `high` is below p; above `low` it is not
    middle = low + (high - low) // 2
    threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None]
    above = jnp.where(probabilities > threshold, probabilities, 0.0)
    inside = jnp.sum(above, axis=-1) < p
    return jnp.where(inside, low, middle), jnp.where(inside, middle, high)

  bits_of_one = jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32)
  # `low` starts below 0.0, so that 0 itself can be the answer.
  bounds = (
    jnp.full((rows,), -1, jnp.int32),
    jnp.full((rows,), bits_of_one, jnp.int32),
  )
  _, high = jax.lax.fori_loop(0, 31, halve, bounds)
  cutoff = jax.lax.bitcast_convert_type(high, jnp.float32)[:, None]
  return jnp.where(probabilities < cutoff, -jnp.inf, logits)


def keep_min_p(logits: Float[Array, "B V"], ratio: Any) -> Float[Array, "B V"]:
  """Returns logits with -inf where the probability is below `ratio` x max."""
  least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(ratio)
  return jnp.where(logits < least, -jnp.inf, logits)


def process_logits(
  logits: Float[Array, "B V"],
  sampling: Sampling,
  occurred: Bool[Array, "B V"] | None = None,
) -> Float[Array, "B V"]:
  """Applies all rules of `sampling`; returns fp32 logits to sample from."""
  logits = logits.astype(jnp.float32)
  if sampling.repetition_penalty is not None and occurred is not None:
    logits = penalize(logits, occurred, sampling.repetition_penalty)
  if sampling.temperature is None:
    return logits
  logits = logits / sampling.temperature
  if sampling.top_k is not None:
    logits = keep_top_k(logits, sampling.top_k)
  if sampling.top_p is not None:
    logits = keep_top_p(logits, sampling.top_p)
  if sampling.min_p is not None:
    logits = keep_min_p(logits, sampling.min_p)
  return logits


def sample(
  logits: Float[Array, "B V"],
  sampling: Sampling,
  keys: PRNGKey,
  step: Int[Array, ""] | Int[Array, "B"] | int,
  occurred: Bool[Array, "B V"] | None = None,
) -> Int[Array, "B"]:
  """Samples the next token of each row.

  Args:
    logits: logits of the last position.
    keys: one random key per row, from `row_keys`.
    step: number of tokens generated so far, shared or per row.
    occurred: whether each token occurs in the row already, for the repetition
      penalty.
  """
  logits = process_logits(logits, sampling, occurred)
  if sampling.temperature is None:
    return _largest(logits)
  step_axis = 0 if jnp.ndim(step) else None
  keys = jax.vmap(jax.random.fold_in, (0, step_axis))(keys, step)
  return jax.vmap(jax.random.categorical)(keys, logits)


def _largest(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
  """Returns the argmax, computed by two single-value reductions.

  XLA's CPU backend vectorises these. Its argmax, a reduction of (value, index)
  pairs, takes 20 times as long: 0.3 ms for SmolLM2's vocabulary, a tenth of a
  decoding step.
  """
  top = jnp.max(logits, axis=-1, keepdims=True)
  is_largest = (logits == top) | jnp.isnan(logits)
  ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
  return jnp.min(jnp.where(is_largest, ids, ids[-1]), axis=-1)
