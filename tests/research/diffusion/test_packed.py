"""Shifted logits where a document does not begin where its row does.

A state before a document's first token is padding's or another document's: the
truth is each document in a row of its own.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.diffusion.alignment import estimators
from research.diffusion.alignment.estimators import FullMask
from research.diffusion.alignment.grpo import GRPO
from research.diffusion.alignment.preference import VRPO
from research.diffusion.learned import GenMD4, Rates
from research.diffusion.objective import MaskedDiffusion
from research.diffusion.sampling.delayed_kv_cache import DelayedKVCache
from research.diffusion.sampling.denoiser import BlockCache, NoCache
from research.diffusion.variants import AnyOrder, ScoreEntropy
from tests import support

V, T, HALF = 16, 6, 3
MASK = V - 1
TIME = 0.5


@functools.cache
def network():
  model = support.model(depth=1, width=16, hidden=16, head_dim=8, vocab=V)
  return model, support.params(model)


def told(tokens):
  """Returns masks that depend on tokens alone; a document's first has one."""
  place = jnp.arange(tokens.shape[-1]) % HALF
  return (tokens % 2 == 0) | (place == 0)


class Given:
  """A draw of those masks, each of which counts 2."""

  def __call__(self, params, batch, key):
    object.__setattr__(self, "tokens", batch["tokens"])
    return super().__call__(params, batch, key)

  def draw(self, key, maskable, segments):
    masked = told(self.tokens) & maskable
    return masked, jnp.full(masked.shape, 2.0)


class Masked(Given, MaskedDiffusion):
  pass


class Ordered(Given, AnyOrder):
  pass


class Scored(Given, ScoreEntropy):
  pass


class Learned(Given, GenMD4):
  def draw(self, key, maskable, w):
    masked = told(self.tokens) & maskable
    return jnp.full((masked.shape[0], 1), TIME), [masked, masked]


def packed():
  tokens = np.random.default_rng(0).integers(0, MASK, (4, T))
  place = np.broadcast_to(np.arange(T), tokens.shape)
  return {
    "tokens": jnp.asarray(tokens, jnp.int32),
    "weights": jnp.ones(tokens.shape, jnp.float32),
    "positions": jnp.asarray(place % HALF, jnp.int32),
    "segments": jnp.asarray(place // HALF, jnp.int32),
  }


def apart(batch):
  """Returns each document in a row of its own."""
  out = {
    k: jnp.concatenate([v[:, :HALF], v[:, HALF:]]) for k, v in batch.items()
  }
  return out | {"segments": jnp.zeros_like(out["segments"])}


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", [Masked, Ordered, Scored, Learned])
@pytest.mark.cover(1)
def test_a_packed_row_is_its_documents(kind, shift):
  model, params = network()
  objective = kind(model=model, mask_id=MASK, shift=shift)
  if kind is Learned:
    params = Rates(vocab=V)(params, jax.random.key(0))

  @jax.jit
  def both(batch):
    return [
      objective(params, b, jax.random.key(0))[:2] for b in (batch, apart(batch))
    ]

  got, want = both(packed())
  chex.assert_trees_all_close(got, want, rtol=1e-5)
  assert float(got[1]) == 4 * T  # first tokens are asked for, too


def padded(tokens, pads, filler):
  """Returns rows with padding on the left, and which tokens are none."""
  tokens = jnp.pad(tokens, ((0, 0), (pads, 0)), constant_values=filler)
  valid = jnp.arange(tokens.shape[1]) >= pads
  return tokens, jnp.broadcast_to(valid, tokens.shape)


def test_estimates_of_a_first_token_do_not_read_padding():
  model, params = network()
  tokens = packed()["tokens"]
  how = FullMask(prompt=0.0)
  grpo = GRPO(model=model, mask_id=MASK, shift=True, estimator=how)

  @jax.jit
  def found(tokens, valid):
    answer, rows = valid, tokens.shape[0]
    keys = jax.random.split(jax.random.key(0), rows)
    views = how.plan(keys, answer, valid)
    one = estimators.estimate(
      model, params, tokens, valid, views, MASK, shift=True
    )
    seed = jnp.arange(rows)
    return one, grpo.estimate(params, tokens, valid, answer, seed)

  want = found(*padded(tokens, 0, 0))
  for filler in (0, 7):
    got = found(*padded(tokens, 2, filler))
    for a, b in zip(got, want, strict=True):
      chex.assert_trees_all_close(a[:, 2:], b, atol=1e-5)
      assert (b < 0).all()


def test_preferences_of_a_first_token_do_not_read_padding():
  """An answer without a prompt, after padding."""
  model, params = network()
  other = jax.tree.map(lambda x: 0.5 * x, params)
  tokens = packed()["tokens"]
  ours = VRPO(
    model=model, mask_id=MASK, shift=True, estimator=FullMask(prompt=0.0)
  )

  @jax.jit
  def margin(tokens, valid):
    batch = {
      "tokens": tokens.reshape(2, 2, -1),
      "segments": jnp.where(valid, 0, -1).reshape(2, 2, -1),
      "weights": jnp.ones((2, 2, tokens.shape[1])),
    }
    tree = dict(params) | {"reference": other}
    return ours(tree, batch, jax.random.key(0))[2]["margin"]

  found = [margin(*padded(tokens, 2, filler)) for filler in (0, 7)]
  chex.assert_trees_all_close(found[0], found[1], atol=1e-5)
  assert abs(found[0]) > 1e-2


@pytest.mark.parametrize("kind", [NoCache, BlockCache, DelayedKVCache])
@pytest.mark.sample(3)
def test_a_row_without_a_prompt_is_itself_beside_longer_ones(kind):
  """Its first token has padding before it, or nothing, if it is alone."""
  model, params = network()
  more = {"mask_id": MASK, "halvings": 0} if kind is DelayedKVCache else {}
  asked = kind(model=model, shift=True, **more)
  tokens = packed()["tokens"].at[:, :HALF].set(MASK)

  @functools.partial(jax.jit, static_argnums=2)
  def logits(tokens, valid, at):
    given = params, tokens, valid, jnp.int32(at), HALF
    first, carry = asked.prefill(*given)
    return first, asked.step(*given, carry)[0]

  want = logits(*padded(tokens, 0, 0), 0)
  got = logits(*padded(tokens, 3, 7), 3)
  chex.assert_trees_all_close(got, want, atol=2e-5)
