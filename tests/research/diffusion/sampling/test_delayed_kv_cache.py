"""Delayed caches against a loop in numpy that keeps keys and values itself."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.diffusion.sampling import sampler
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.delayed_kv_cache import DelayedKVCache
from research.diffusion.sampling.denoiser import NoCache
from tests import support

V, T, K, DIM = 24, 16, 8, 8
MASK = V - 1
PROMPTS = [[3, 1, 4], [5, 9, 2, 6, 5, 3, 5, 8]]


@functools.cache
def network():
  model = support.model(
    depth=2, width=32, hidden=32, heads=4, kv_heads=2, head_dim=DIM, vocab=V
  )
  return model, support.params(model)


@functools.cache
def delayed(**changes):
  changes = dict(halvings=1) | changes
  return DelayedKVCache(model=network()[0], mask_id=MASK, **changes)


def filled(d, prompts=tuple(map(tuple, PROMPTS)), numbers=(0, 1), block=K):
  options = SamplerConfig(mask_id=MASK, length=8, block=block)
  state = sampler.start(
    [list(p) for p in prompts], options, jax.random.key(0), jnp.array(numbers)
  )
  return sampler.sample(d, network()[1], state, options)


# --- the loop ---


def norm(x, scale):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def rotated(x, place):
  half = DIM // 2
  angle = place[:, None] * 10_000 ** (-np.arange(half) / half)
  cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
  a, b = x[..., :half], x[..., half:]
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def read(p, tokens, at, memory):
  """Reads some places of one row; writes their keys, values and states."""
  keys, values, states = memory
  x = p["embed"][tokens[at]]
  for n in range(2):
    w = jax.tree.map(lambda w, n=n: w[n], p["run0"]["layer0"])
    h = norm(x, w["attention_norm"]["scale"])
    q, k, v = (
      (h @ w["attention"][name]).reshape(len(at), -1, DIM) for name in "qkv"
    )
    keys[n, at], values[n, at] = rotated(k, at), v
    z = np.einsum("thd,shd->hts", rotated(q, at), np.repeat(keys[n], 2, axis=1))
    z = np.exp(z / np.sqrt(DIM))
    z /= z.sum(-1, keepdims=True)
    o = np.einsum("hts,shd->thd", z, np.repeat(values[n], 2, axis=1))
    x = x + o.reshape(len(at), -1) @ w["attention"]["o"]
    h = norm(x, w["mlp_norm"]["scale"])
    gate = h @ w["mlp"]["gate"]
    x = (
      x + (gate / (1 + np.exp(-gate)) * (h @ w["mlp"]["up"])) @ w["mlp"]["down"]
    )
  states[at] = norm(x, p["final_norm"]["scale"])


def by_hand(prompt, refresh, shift, block):
  """Returns one row's tokens; a place a call, the surest."""
  p = jax.tree.map(lambda w: np.asarray(w, np.float64), network()[1])
  tokens = np.array(prompt + [MASK] * 8)
  length, head = len(tokens), p["head"]
  for start in range(length - 8, length, block):
    memory = (
      np.zeros((2, length, 2, DIM)),
      np.zeros((2, length, 2, DIM)),
      np.zeros((length, 32)),
    )
    last, calls = None, 0
    while (tokens[start : start + block] == MASK).any():
      if last is None or (refresh is not None and calls == refresh):
        at, calls = np.arange(length), 0
      else:
        need = set(np.flatnonzero(tokens == MASK)) | {last}
        if shift:
          need |= {i - 1 for i in np.flatnonzero(tokens == MASK) if i}
        at = np.array(sorted(need))
      read(p, tokens, at, memory)
      calls += 1
      own = np.arange(start, start + block) - shift
      z = memory[2][np.maximum(own, 0)] @ head
      z[:, MASK] = -np.inf
      chance = np.exp(z - z.max(-1, keepdims=True))
      chance = (chance / chance.sum(-1, keepdims=True)).max(-1)
      chance[tokens[start : start + block] != MASK] = -1
      best = int(chance.argmax())
      tokens[start + best], last = z[best].argmax(), start + best
  return tokens


@pytest.mark.parametrize(
  ("refresh", "block", "shift"),
  [(None, 8, False), (3, 8, True), (None, 4, True)],
)
@pytest.mark.sample(3)
def test_it_fills_in_what_the_loop_does(refresh, block, shift):
  got = filled(delayed(refresh=refresh, shift=shift), block=block)
  assert got.calls == 8
  for row, prompt in zip(got.tokens, PROMPTS, strict=True):
    want = by_hand(prompt, refresh, shift, block)
    np.testing.assert_array_equal(row[-len(want) :], want)


@pytest.mark.slow
def test_read_again_at_every_call_it_is_no_cache():
  whole = NoCache(model=network()[0])
  got, want = filled(delayed(refresh=1)), filled(whole)
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_array_equal(got.filled, want.filled)


def logits(d, steps):
  """Returns a block's logits after each change of a row's tokens."""
  params = network()[1]
  rows = np.random.default_rng(0).integers(0, MASK, (2, T))
  rows[:, K:] = MASK
  valid = jnp.arange(T) >= jnp.array([2, 0])[:, None]
  tokens = [jnp.asarray(rows, jnp.int32)]
  for at, token in steps:
    tokens.append(tokens[-1].at[:, at].set(token))

  @jax.jit
  def run():
    out, carry = d.prefill(params, tokens[0], valid, jnp.int32(K), K)
    found = [out]
    for x in tokens[1:]:
      out, carry = d.step(params, x, valid, jnp.int32(K), K, carry)
      found.append(out)
    return found

  return run()


STEPS = [(9, 5), (12, 7), (8, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.sample(2, 1)
def test_logits_are_those_of_whole_rows_while_all_is_read(shift):
  want = logits(NoCache(model=network()[0], shift=shift), STEPS)
  scale = float(jnp.abs(jnp.stack(want)).max())
  got = logits(delayed(refresh=1, shift=shift), STEPS)
  # Two layers in fp32.
  chex.assert_trees_all_close(got, want, atol=2e-5 * scale, rtol=0)
  # Without, they drift once something changes, and are right when renewed.
  got = logits(delayed(refresh=2, shift=shift), STEPS)
  apart = [float(jnp.abs(a - b).max()) for a, b in zip(got, want, strict=True)]
  assert apart[0] < 2e-5 * scale and apart[2] < 2e-5 * scale
  assert apart[1] > 1e-3 * scale and apart[3] > 1e-3 * scale


def test_what_is_read_are_masks_and_what_was_just_filled():
  tokens = jnp.array([[1, 2, MASK, 4, MASK, 6], [1, MASK, 3, 4, 5, 6]])
  seen = jnp.array([[1, 2, MASK, MASK, MASK, 6], [1, MASK, 3, 4, 9, 6]])
  valid = jnp.ones((2, 6), bool).at[1, 1].set(False)
  got = delayed().needed(tokens, valid, seen)
  want = [[0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0]]
  np.testing.assert_array_equal(got, np.array(want, bool))
  got = delayed(shift=True).needed(tokens, valid, seen)
  want = [[0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0]]
  np.testing.assert_array_equal(got, np.array(want, bool))


@pytest.mark.slow
def test_padding_of_what_is_read_changes_nothing():
  """However few sizes there are."""
  few, many = (logits(delayed(halvings=n), STEPS[:1]) for n in (0, 4))
  scale = float(jnp.abs(jnp.stack(few)).max())
  chex.assert_trees_all_close(few, many, atol=2e-5 * scale, rtol=0)


@pytest.mark.slow
def test_rows_do_not_depend_on_their_batch():
  d = delayed(refresh=None, shift=False)
  both = filled(d)
  alone = filled(d, (tuple(PROMPTS[0]),), (0,))
  size = len(PROMPTS[0]) + 8
  np.testing.assert_array_equal(alone.tokens[0], both.tokens[0, -size:])
