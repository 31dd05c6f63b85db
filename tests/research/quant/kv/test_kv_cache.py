"""Tests the quantized cache against KIVI's rules for all tokens at once."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode_attention import pages as paging
from kernels_pallas.decode_attention.api import paged_attention
from research.quant.kv.kv_quantizer import KVQuantizer
from tests import support_pages
from tests.research.quant import kivi

ROWS, HEADS, DIM, TIME = 2, 2, 8, 45
RNG = np.random.default_rng(0)
K, V = RNG.standard_normal((2, ROWS, TIME, HEADS, DIM)).astype(np.float32)
K[..., 1] += 5
KIVI = KVQuantizer(group=4, residual=8)
CHOICES = {
  "kivi": KIVI,
  "no residual": dataclasses.replace(KIVI, residual=0, bits_k=2, bits_v=8),
  "sinks": dataclasses.replace(KIVI, sink_tokens=3),
  "tokens": dataclasses.replace(KIVI, key="per_token", residual=5),
  "channels": dataclasses.replace(KIVI, value="per_channel", bits_v=2),
  "keys alone": dataclasses.replace(KIVI, bits_v=16),
  "values alone": dataclasses.replace(KIVI, bits_k=16, residual=0),
}


def left(kv, row, written):
  """Returns keys and values of a row after `written` tokens, `[S, K, H]`."""
  out = []
  for x, axis, bits in (
    (K, kv.key, kv.bits_k),
    (V, kv.value, kv.bits_v),
  ):
    heads = [
      x[row, :written, head]
      if bits == 16
      else kivi.remembered(
        x[row, :written, head],
        axis.removeprefix("per_"),
        bits,
        kv.group,
        kv.residual,
        kv.sink_tokens,
      )
      for head in range(HEADS)
    ]
    out.append(np.stack(heads, 1))
  return out


@functools.partial(jax.jit, static_argnames=("fresh", "window"))
def _extend(layer, k, v, positions, length, fresh, window=None):
  return layer.extend(k, v, positions, length, fresh=fresh, window=window)


def _fed(kv, pieces, lengths, slots=48, window=None):
  """Yields (before, new, keys, values, held) of calls of the given sizes.

  The first call is a fresh prefill of `lengths` tokens; all rows then go on.
  """
  layer = kv.empty(
    (ROWS, HEADS), slots, DIM, jnp.float32, windowed=window is not None
  )
  before = np.zeros(ROWS, int)
  for i, size in enumerate(pieces):
    new = np.array(lengths) if i == 0 else np.full(ROWS, size)
    step = np.arange(size)
    positions = np.where(step < new[:, None], before[:, None] + step, -1)
    k, v = (
      np.stack([x[r, np.maximum(positions[r], 0)] for r in range(ROWS)])
      for x in (K, V)
    )
    layer, keys, values, held = _extend(
      layer, k, v, positions, before + new, fresh=i == 0, window=window
    )
    yield before, new, keys, values, held
    before = before + new
  assert layer.slots >= slots


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.sample(3, 2, 1)
def test_the_contents_of_the_cache(name):
  """Rows of different lengths; new tokens unquantized, older ones rounded."""
  pieces = (7, *[1] * 10, 11, 1, 11, *[1] * 4)
  kv = CHOICES[name]
  calls = _fed(kv, pieces, (7, 4))
  before, _, keys, _, held = next(calls)
  assert held is None and keys.shape[1] == 7
  for before, new, keys, values, held in calls:
    for row in range(ROWS):
      n = before[row]
      own = slice(n, n + new[row])
      want = left(kv, row, n)
      want = [
        np.concatenate([old, x[row, own]])
        for old, x in zip(want, (K, V), strict=True)
      ]
      alive = np.asarray(held[row]) >= 0
      place = np.asarray(held[row])[alive]
      assert sorted(place) == list(range(n + new[row]))
      for got, expected in zip((keys, values), want, strict=True):
        found = np.asarray(got[row])[alive][np.argsort(place)]
        np.testing.assert_allclose(found, expected, rtol=2**-22, atol=2e-6)


@pytest.mark.parametrize(
  "name, pieces",
  [
    ("kivi", (3, *[1] * 6, 9, *[1] * 12, 9, 1)),
    ("kivi", (19, *[1] * 20)),
    ("tokens", (3, *[1] * 6, 9, *[1] * 12, 9, 1)),
  ],
)
@pytest.mark.sample(3)
def test_a_window_is_a_ring(name, pieces):
  """All tokens within a window of 10 are there."""
  kv, window = CHOICES[name], 10
  calls = _fed(kv, pieces, (pieces[0], pieces[0]), slots=window, window=window)
  next(calls)
  for before, new, keys, values, held in calls:
    n = before[0]
    first = max(n - window + 1, 0)
    for row in range(ROWS):
      place = list(np.asarray(held[row]))
      at = [place.index(p) for p in range(first, n)]
      for got, expected in zip((keys, values), left(kv, row, n), strict=True):
        found = np.asarray(got[row])[at]
        np.testing.assert_allclose(
          found, expected[first:], rtol=2**-22, atol=2e-6
        )
      assert set(range(n, n + new[row])) <= set(place)


def test_memory_is_packed():
  layer = KVQuantizer(residual=128).empty((1, 3), 1024, 64, jnp.bfloat16)
  numbers = 3 * 1024 * 64
  for side in (layer.k, layer.v):
    assert side.packed.codes.nbytes == numbers // 2
    assert side.packed.scale.nbytes == side.packed.low.nbytes == numbers // 16
    assert side.recent.nbytes == 3 * 128 * 64 * 2
  two = KVQuantizer(bits_k=2, bits_v=2, residual=0)
  layer = two.empty((1, 3), 1024, 64, jnp.bfloat16)
  assert layer.k.packed.codes.nbytes == layer.v.packed.codes.nbytes
  assert layer.v.packed.codes.nbytes == numbers // 4
  assert layer.v.recent is None


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["int8", "fp8"])
@pytest.mark.sample(3)
def test_single_tokens_as_pages(bits):
  """The bytes that the kernels' own append writes, and what they attend to."""
  kv = KVQuantizer("per_token", "per_token", bits, bits, residual=0)
  layer = kv.empty((ROWS, HEADS), 16, DIM, jnp.float32)
  lengths = np.array([13, 9])
  positions = np.where(np.arange(13) < lengths[:, None], np.arange(13), -1)
  layer, *_ = _extend(
    layer, K[:, :13], V[:, :13], positions, lengths, fresh=True
  )
  lengths = jnp.asarray(lengths)
  got, table = support_pages.pages(layer, 8)
  dtype = jnp.int8 if bits == "int8" else jnp.float8_e4m3fn
  want = paging.empty_pages(4, HEADS, 8, DIM, dtype)
  new = [np.concatenate([x[0, :13], x[1, :9]]) for x in (K, V)]
  want = paging.append_to_pages(
    want, *map(jnp.asarray, new), table, lengths, jnp.array([0, 13, 22])
  )
  chex.assert_trees_all_equal(
    jax.tree.map(lambda x: np.asarray(x).view(np.uint8), got),
    jax.tree.map(lambda x: np.asarray(x).view(np.uint8), want),
  )
  q = RNG.standard_normal((ROWS, 4, DIM)).astype(np.float32)
  keys, values = (
    side.grid.decode(side.packed).swapaxes(1, 2) for side in (layer.k, layer.v)
  )
  logits = np.einsum("bkgh,bskh->bkgs", q.reshape(2, HEADS, 2, DIM), keys)
  logits = np.where(np.arange(16) < lengths[:, None, None, None], logits, -99)
  chances = np.asarray(jax.nn.softmax(logits * DIM**-0.5))
  want = np.einsum("bkgs,bskh->bkgh", chances, values).reshape(q.shape)
  found = paged_attention(jnp.asarray(q), got, table, lengths)
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
