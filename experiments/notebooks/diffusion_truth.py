"""A perfect denoiser: what is masked in a Markov chain, given what is not.

A place depends on the nearest tokens known on either side alone,

  p(x_i = v | l at distance a, r at distance b) ~ P^a[l, v] P^b[v, r],

so errors of samplers can be separated from those of a model, and a model's
bound beside the entropy.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from research.data.sources.synthetic import Markov
from research.diffusion.sampling.denoiser import Denoiser
from research.typing import Array, Bool, Float, Int, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain(Denoiser):
  """A `denoiser.Denoiser`, whose parameters are those of `tables`.

  Attributes:
    mask_id: of the mask, one more than the chain's states.
  """

  mask_id: int

  def scores(
    self,
    params: Params,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"] | None = None,
  ) -> Float[Array, "B T V"]:
    """Returns log p of every place, as if it were masked; none for the mask."""
    del valid
    powers, stationary = params["powers"], params["stationary"]
    count = tokens.shape[1]
    place = jnp.arange(count)
    known = tokens != self.mask_id
    # The nearest known place strictly before, and strictly after.
    before = jax.lax.cummax(jnp.where(known, place, -1), axis=1)
    before = jnp.pad(before, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    after = jax.lax.cummin(jnp.where(known, place, count), axis=1, reverse=True)
    after = jnp.pad(after, ((0, 0), (0, 1)), constant_values=count)[:, 1:]

    def token(at):
      found = jnp.take_along_axis(tokens, jnp.clip(at, 0, count - 1), axis=1)
      return jnp.minimum(found, powers.shape[-1] - 1)

    left = powers[place - jnp.maximum(before, 0), token(before)]
    left = jnp.where((before >= 0)[..., None], left, stationary)
    right = powers[jnp.minimum(after, count - 1) - place, :, token(after)]
    right = jnp.where((after < count)[..., None], right, 1.0)
    found = jnp.log(left) + jnp.log(right)
    return jnp.pad(found, ((0, 0), (0, 0), (0, 1)), constant_values=-1e9)

  def prefill(self, params, tokens, valid, start, size):
    found = self.scores(params, tokens)
    return jax.lax.dynamic_slice_in_dim(found, start, size, axis=1), ()

  def step(self, params, tokens, valid, start, size, carry):
    return self.prefill(params, tokens, valid, start, size)


def tables(source: Markov, length: int) -> Params:
  """Returns `powers` of the transitions, `[length, V, V]`, and `stationary`."""
  powers = [np.eye(source.vocab)]
  for _ in range(length - 1):
    powers.append(powers[-1] @ source.transitions)
  return {
    "powers": jnp.asarray(np.stack(powers), jnp.float32),
    "stationary": jnp.asarray(source.stationary, jnp.float32),
  }


def surprise(source: Markov, rows: np.ndarray) -> Float[np.ndarray, " B"]:
  """Returns -log p of each row, nats."""
  first = np.log(source.stationary[rows[:, 0]])
  rest = np.log(source.transitions[rows[:, :-1], rows[:, 1:]])
  return -(first + rest.sum(-1))


def entropy(source: Markov, length: int) -> float:
  """Returns the mean of `surprise` over the chain's own rows, nats a token."""
  p = source.stationary
  return float(-(p * np.log(p)).sum() + (length - 1) * source.optimal_loss) / (
    length
  )


def off(source: Markov, rows: np.ndarray) -> float:
  """Returns the total variation between pairs of neighbours here and there.

  Both mistakes and a lack of variety count; a sample of n pairs of the chain
  itself has about sqrt(V^2 / n) / 3.
  """
  pairs = np.zeros((source.vocab, source.vocab))
  np.add.at(pairs, (rows[:, :-1].ravel(), rows[:, 1:].ravel()), 1.0)
  want = source.stationary[:, None] * source.transitions
  return float(0.5 * np.abs(pairs / pairs.sum() - want).sum())
