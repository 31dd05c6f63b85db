"""Cached decoding equals the full forward pass, for all families' features."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree
from research.nn import presets
from research.nn import transformer as transformers

SIZES = presets.Sizes(
  vocab=61,
  width=20,
  depth=3,
  heads=4,
  kv_heads=2,
  hidden=24,
  head_dim=6,
  window=5,
)
WITH = {
  "llama": {},
  "mistral": {},
  "qwen3": {},
  "gemma2": {
    "attention_softcap": 4.0,
    "logit_softcap": 3.0,
    "attention_scale": 0.3,
  },
  "gemma3": {"depth": 7, "local_theta": 1_000.0},
}
TIME = 17  # more than three windows


@functools.cache
def model_and_params(name):
  sizes = dataclasses.replace(SIZES, **WITH[name])
  model = presets.transformer(presets.FAMILIES[name], sizes)
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]
  # Not as at initialisation, so that attention is far from uniform.
  keys = jax.random.split(jax.random.key(2), len(jax.tree.leaves(params)))
  keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
  return model, jax.tree.map(
    lambda x, k: 0.3 * jax.random.normal(k, x.shape), params, keys
  )


@functools.partial(jax.jit, static_argnums=0)
def _read(model, params, tokens, cache, lengths=None):
  hidden, cache = model.apply(
    {"params": params}, tokens, cache=cache, lengths=lengths
  )
  return model.apply({"params": params}, hidden, method="logits"), cache


@functools.cache
def full_logits(name):
  model, params = model_and_params(name)
  tokens = jax.random.randint(jax.random.key(3), (2, TIME), 0, SIZES.vocab)
  logits, _ = _read(model, params, tokens, None)
  return tokens, logits


def _cache(name, rows=2, capacity=TIME + 3):
  return transformers.init_cache(*model_and_params(name), rows, capacity)


@pytest.mark.parametrize("name", WITH)
# The second piece of the first case fits the window, and overwrites its keys.
@pytest.mark.parametrize("pieces", [(2, 4, 10, 1), (3,) + (1,) * 14])
@pytest.mark.cover(1)
@pytest.mark.sample(8, 3)
def test_pieces_of_any_size_are_the_whole(name, pieces):
  tokens, expected = full_logits(name)
  cache, out, at = _cache(name), [], 0
  for n in pieces:
    part = tokens[:, at : at + n]
    logits, cache = _read(*model_and_params(name), part, cache)
    out.append(logits)
    at += n
  scale = float(jnp.max(jnp.abs(expected)))
  chex.assert_trees_all_close(
    jnp.concatenate(out, axis=1), expected, atol=1e-5 * scale
  )
  chex.assert_trees_all_equal(cache.length, jnp.full((2,), TIME))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
@pytest.mark.sample(3)
def test_rows_of_different_lengths(name):
  """A padded prompt, then one token per row: equals each row by itself."""
  tokens, expected = full_logits(name)
  lengths = np.array([9, 4])
  padded = jnp.where(jnp.arange(10) < lengths[:, None], tokens[:, :10], 60)
  logits, cache = _read(*model_and_params(name), padded, _cache(name), lengths)
  scale = float(jnp.max(jnp.abs(expected)))
  for row, n in enumerate(lengths):
    chex.assert_trees_all_close(
      logits[row, :n], expected[row, :n], atol=1e-5 * scale
    )
  for _ in range(6):
    chex.assert_trees_all_equal(cache.length, jnp.asarray(lengths))
    next_ = tokens[jnp.arange(2), lengths][:, None]
    logits, cache = _read(*model_and_params(name), next_, cache)
    chex.assert_trees_all_close(
      logits[:, 0], expected[jnp.arange(2), lengths], atol=1e-5 * scale
    )
    lengths = lengths + 1


@pytest.mark.slow
def test_a_window_needs_no_more_than_its_ring():
  layers = _cache("gemma2", capacity=64).layers["run0"]
  assert layers["layer0"].slots == SIZES.window
  assert layers["layer1"].slots == 64


def test_the_cache_follows_unrolled_runs():
  model, params = model_and_params("llama")
  tokens, expected = full_logits("llama")
  params = tree.unroll(params)
  cache = transformers.init_cache(model, params, 2, TIME)
  assert len(cache.layers) == SIZES.depth
  logits, _ = _read(model, params, tokens, cache)
  chex.assert_trees_all_close(logits, expected, atol=1e-5)
