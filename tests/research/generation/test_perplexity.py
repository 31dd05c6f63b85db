"""Perplexity against a reference over full logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from research.generation import perplexity as p
from research.nn import presets, rope
from research.quant.kv.kv_quantizer import KVQuantizer
from research.typing import UserError
from tests import support

MODEL = presets.transformer(
  presets.FAMILIES["llama"],
  presets.Sizes(
    vocab=31,
    width=12,
    depth=1,
    heads=2,
    kv_heads=1,
    hidden=16,
    head_dim=6,
    max_positions=128,
  ),
)
IDS = np.random.default_rng(0).integers(0, 31, 437).tolist()


@functools.cache
def params():
  return jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))[
    "params"
  ]


@jax.jit
def _full(tokens):
  hidden, _ = MODEL.apply({"params": params()}, tokens)
  return MODEL.apply({"params": params()}, hidden, method="logits")


@functools.cache
def _losses(window, max_windows):
  """Each predicted token's loss, window by window, in float64."""
  out = []
  for start in range(0, len(IDS), window)[:max_windows]:
    part = IDS[start : start + window]
    if len(part) < 2:
      continue
    padded = np.zeros((1, window), np.int32)
    padded[0, : len(part)] = part
    found = np.asarray(_full(padded), np.float64)[0]
    chances = np.exp(found) / np.exp(found).sum(-1, keepdims=True)
    out += [-np.log(chances[i - 1, t]) for i, t in enumerate(part) if i]
  return np.array(out)


@pytest.mark.parametrize(
  "window, max_windows, batch, windows, tokens",
  [
    (100, None, 1, 5, 432),  # the last has 37
    (100, None, 3, 5, 432),  # 297 positions: two chunks of logits
    (100, 2, 8, 2, 198),
    (109, None, 2, 4, 432),  # one token left over, which counts nothing
    (2, 8, 8, 8, 8),
  ],
)
@pytest.mark.sample(6)
def test_against_full_logits(window, max_windows, batch, windows, tokens):
  found = p.perplexity(MODEL, params(), IDS, window, max_windows, batch)
  losses = _losses(window, max_windows)
  assert (found.windows, found.tokens) == (windows, tokens)
  assert len(losses) == tokens
  np.testing.assert_allclose(found.nll, losses.mean(), rtol=1e-5)
  np.testing.assert_allclose(found.perplexity, np.exp(losses.mean()), rtol=1e-5)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("begin", [(30,), (30, 5)])
def test_special_tokens_stand_before_each_window(begin, chunk):
  """The same tokens are predicted, from one window and bos alone."""
  found = p.perplexity(
    MODEL, params(), IDS, 100, None, 2, chunk=chunk, begin=begin
  )
  assert (found.windows, found.tokens) == (5, 432)
  want = []
  for start in range(0, len(IDS), 100):
    row = [*begin, *IDS[start : start + 100]]
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(row)] = row
    logits = np.asarray(_full(jnp.asarray(padded)), np.float64)[0]
    chances = special.log_softmax(logits, -1)
    first = len(begin) + 1
    want += [-chances[i - 1, row[i]] for i in range(first, len(row))]
  np.testing.assert_allclose(found.nll, np.mean(want), rtol=1e-5)


def test_padding_does_not_change_how_a_text_is_rotated():
  """`rope.Dynamic` rotates by a text's length, from its fourth token on."""
  model = support.with_scaling(MODEL, rope.Dynamic(factor=4.0, original=4))
  tokens = jnp.asarray([IDS[:9]])
  want = p.log_probs(model, params(), tokens)
  padded = jnp.pad(tokens, ((0, 0), (0, 23)))
  found = p.log_probs(model, params(), padded, jnp.array([9]))
  np.testing.assert_allclose(found[:, :8], want, rtol=1e-5)
  plain = p.log_probs(MODEL, params(), tokens)
  assert np.abs(plain - want).max() > 1e-3


def test_a_whole_text_of_one_window():
  found = p.perplexity(MODEL, params(), IDS[:100], 100)
  assert (found.windows, found.tokens) == (1, 99)


@pytest.mark.parametrize("chunk", [None, 100])
def test_a_text_shorter_than_a_window_is_a_partial_one(chunk):
  """Down to two tokens, as for any other last window."""
  for size in (37, 2):
    found = p.perplexity(MODEL, params(), IDS[:size], 100, 8, 3, chunk=chunk)
    assert (found.windows, found.tokens) == (1, size - 1)
    want = _losses(100, 1)[: size - 1].mean()
    np.testing.assert_allclose(found.nll, want, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_through_a_cache_is_the_same(chunk):
  found = p.perplexity(MODEL, params(), IDS, 100, None, 3, chunk=chunk)
  assert (found.windows, found.tokens) == (5, 432)
  np.testing.assert_allclose(found.nll, _losses(100, None).mean(), rtol=1e-5)


@pytest.mark.slow
def test_what_is_packed_is_read_by_later_chunks():
  """Two-bit caches change the result, unless there is a single chunk."""
  kv = KVQuantizer(bits_k=2, bits_v=16, group=4, residual=0)
  want = _losses(100, None).mean()
  by_one, by_all = (
    p.perplexity(MODEL, params(), IDS, 100, None, 5, chunk=chunk, kv=kv).nll
    for chunk in (1, 100)
  )
  assert abs(by_one - want) > 1e-4
  np.testing.assert_allclose(by_all, want, rtol=1e-5)


@pytest.mark.parametrize(
  "arguments, words",
  [
    (dict(window=1), "window: found 1"),
    (dict(window=129), "context of 128"),
    (dict(window=128, begin=(1,)), "128 tokens and 1 special before them"),
    (dict(ids=[]), "found 0 tokens, expected at least 2"),
    (dict(ids=[1]), "found 1 tokens, expected at least 2"),
    (dict(max_windows=0), "max_windows: found 0"),
    (dict(batch=0), "batch: found 0"),
    (dict(chunk=0), "chunk: found 0"),
    (dict(chunk=101), "chunk: found 101, expected 1 to the window: 100"),
    (dict(kv=KVQuantizer()), "kv: found no chunk"),
  ],
)
def test_bad_arguments(arguments, words):
  arguments = dict(ids=IDS, window=100) | arguments
  with pytest.raises(UserError, match=words):
    p.perplexity(MODEL, params(), **arguments)
