"""The paged cache equals the contiguous cache, for any page placement."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import jaxpr_as_fun

from kernels_pallas.masks import Mask
from research import sharding
from research.nn.cache import LayerCache, SlotCache, write
from research.nn.cache.paged import (
  CODE_DTYPES,
  copy_page,
  empty_pool,
  paged_cache,
  pool_from_cache,
)
from research.nn.transformer import init_cache
from research.quant.kv.kv_quantizer import KVQuantizer
from research.typing import UserError
from tests import support, support_hlo, support_mesh, support_pages
from tests.research.nn.test_decode_attention import programs_for_a_tpu

SIZE, COUNT, WIDTH, ROWS = 4, 24, 6, 3
# Tokens of each row in each call: prompts, more of them, then one by one; a row
# may have none, and some later.
CALLS = [(9, 4, 1), (3, 0, 5), (1, 1, 1), (1, 0, 1), (1, 1, 1), (1, 0, 1)]


@functools.partial(
  jax.jit, static_argnums=0, compiler_options=support_mesh.QUICKLY
)
def step(model, params, tokens, counts, cache):
  hidden, cache = model.apply(
    {"params": params}, tokens, cache=cache, lengths=counts
  )
  return model.apply({"params": params}, hidden, method="logits"), cache


def calls():
  """Yields tokens, padded, and how many of each row."""
  for n, counts in enumerate(CALLS):
    yield support.tokens(ROWS, max(counts), seed=n), jnp.array(counts)


def read(model, params, start, more=lambda cache: cache):
  """Returns the logits of all tokens, and the cache after them.

  Args:
    model: over pages or slabs.
    params: its parameters.
    start: an empty cache.
    more: between calls, what becomes of the cache.
  """
  out, cache = [], start
  for tokens, counts in calls():
    logits, cache = step(model, params, tokens, counts, cache)
    out += [x[:n] for x, n in zip(logits, counts, strict=True)]
    cache = more(cache)
  return jnp.concatenate(out), cache


def table(seed=0):
  """Pages of each row, as many as it needs, in random order; else none."""
  order = np.random.default_rng(seed).permutation(COUNT)
  found, used = np.full((ROWS, WIDTH), -1, np.int32), 0
  for row, n in enumerate(-(-np.sum(CALLS, axis=0) // SIZE)):
    found[row, :n] = order[used : used + n]
    used += n
  return found


def pool(model, params, dtype=None):
  """A pool with NaN in every page, none of them written or assigned."""
  return jax.tree.map(
    lambda x: x if x.dtype == jnp.int8 else jnp.full_like(x, jnp.nan),
    empty_pool(model, params, COUNT, SIZE, dtype),
  )


def paged(model, params, seed=0, dtype=None):
  nobody = jnp.zeros(ROWS, jnp.int32)
  return paged_cache(
    pool(model, params, dtype), jnp.asarray(table(seed)), nobody
  )


@pytest.mark.parametrize(
  "family", [pytest.param("llama", marks=pytest.mark.slow), "gemma2"]
)
def test_ragged_rows_say_what_they_say_without_pages(family):
  """Groups of two heads share keys; Gemma's layers have window 6 or none."""
  model = support.model(family, depth=2)
  params = support.params(model)
  want, cache = read(model, params, init_cache(model, params, ROWS, 24))
  before = step._cache_size()
  got, pages = read(model, params, paged(model, params))
  assert step._cache_size() == before + 3  # a program for each shape of tokens
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)
  assert jnp.array_equal(pages.length, cache.length)
  assert np.abs(want).max() > 1


def test_no_number_depends_on_where_pages_are():
  model = support.model("gemma2", depth=2)
  params = support.params(model)
  got, want = (read(model, params, paged(model, params, s))[0] for s in (1, 2))
  chex.assert_trees_all_equal(got, want)
  assert not np.array_equal(table(1), table(2))


@pytest.mark.slow
def test_pages_that_two_rows_share_are_pages_of_ones_own():
  """Bitwise; the page where they diverge is copied, then written."""
  model = support.model("gemma2", depth=2)
  params = support.params(model)
  row = support.tokens(1, 10)
  apart = jnp.array([[0, 1, 2, 3], [10, 11, 12, 13]])
  shared = jnp.array([[0, 1, 2, 3], [0, 1, 12, 13]])
  one = paged_cache(pool(model, params), shared[:1], jnp.zeros(1, jnp.int32))
  pages = pool_from_cache(step(model, params, row, jnp.array([10]), one)[1])
  few = copy_page(pages, jnp.int32(2), jnp.int32(12))
  all_ = few
  for source, target in ((0, 10), (1, 11)):
    all_ = copy_page(all_, jnp.int32(source), jnp.int32(target))
  found = []
  for held, where in ((all_, apart), (few, shared)):
    cache = paged_cache(held, where, jnp.array([10, 10]))
    for n in range(4):
      tokens = support.tokens(2, 1, seed=n)
      logits, cache = step(model, params, tokens, jnp.array([1, 1]), cache)
      found.append(logits)
  chex.assert_trees_all_equal(found[:4], found[4:])
  assert np.abs(found[3][0] - found[3][1]).max() > 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded(SlotCache):
  """A cache of exact keys and values that rounds on reading."""

  k: Any
  v: Any
  dtype: str = dataclasses.field(metadata=dict(static=True))

  @property
  def slots(self):
    return self.k.shape[-2]

  def extend(self, k, v, positions, length, *, fresh, window=None, bias=None):
    whole = write(LayerCache(self.k, self.v), k, v, positions, length)
    written = Rounded(whole.k, whole.v, self.dtype)
    slot = jnp.arange(self.slots)
    held = jnp.where(slot < length[:, None], slot, -1)
    keys, values = (
      rounded(x, self.dtype).swapaxes(1, 2) for x in (whole.k, whole.v)
    )
    return written, keys, values, held


def rounded(x, dtype):
  """By definition: the largest value of a token's head is exact."""
  most = {"int8": 127.0, "fp8": 448.0}[dtype]
  scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / most
  codes = x / jnp.where(scale == 0, 1, scale)
  if dtype == "int8":
    return jnp.round(codes) * scale
  return codes.astype(jnp.float8_e4m3fn).astype(jnp.float32) * scale


@dataclasses.dataclass(frozen=True)
class RoundedWhole:
  """Creates them, equally long for windowed and other layers."""

  dtype: str

  def for_layers(self, layers):
    return self

  def empty(self, lead, slots, dim, dtype, windowed=False):
    zeros = jnp.zeros((*lead, SIZE * WIDTH, dim), dtype)
    return Rounded(zeros, zeros, self.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", CODE_DTYPES)
@pytest.mark.sample(2)
def test_pages_in_8_bits_are_a_cache_that_rounds_every_token(dtype):
  model = support.model("gemma2", depth=2)
  params = support.params(model)
  start = init_cache(model, params, ROWS, 24, kv=RoundedWhole(dtype))
  want, _ = read(model, params, start)
  got, _ = read(model, params, paged(model, params, dtype=dtype))
  # Sums in another order; a code at a tie may fall either way, once.
  close = np.abs(got - want) <= 1e-4 * np.abs(want).max()
  assert close.mean() > 0.99
  whole, _ = read(model, params, init_cache(model, params, ROWS, 24))
  assert np.abs(want - whole).max() > 1e-3 * np.abs(whole).max()


@pytest.mark.parametrize("dtype", CODE_DTYPES)
@pytest.mark.sample(2)
def test_pages_in_8_bits_hold_the_quantized_caches_bytes(dtype):
  model = support.model(depth=1)
  params = support.params(model)
  kv = KVQuantizer("per_token", "per_token", dtype, dtype, residual=0)
  tokens, counts = next(calls())
  nobody = jnp.zeros(ROWS, jnp.int32)
  slab = init_cache(model, params, ROWS, 12, kv=kv)
  _, slab = step(model, params, tokens, counts, slab)
  layer = jax.tree.map(lambda x: x[0], slab.layers["run0"]["layer0"])
  want, where = support_pages.pages(layer, SIZE)
  held = empty_pool(model, params, want.count, SIZE, dtype)
  _, cache = step(
    model, params, tokens, counts, paged_cache(held, where, nobody)
  )
  got = jax.tree.map(lambda x: x[0], pool_from_cache(cache)["run0"]["layer0"])
  chex.assert_trees_all_equal(
    *(jax.tree.map(lambda x: np.asarray(x).view(np.uint8), x)
      for x in (got, want))
  )  # fmt: skip
  assert np.any(np.asarray(got.kv).view(np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize(
  "layout", [pytest.param("tensor", marks=pytest.mark.slow), "mixed"]
)
def test_heads_over_devices_are_one_devices(layout):
  model = support.model("gemma2", depth=2, heads=16, kv_heads=8, vocab=64)
  params = support.params(model)
  want, _ = read(model, params, paged(model, params))
  plan = support_mesh.LAYOUTS[layout]
  mesh = plan.mesh()
  place = plan.shardings(params, mesh, sharding.head_counts(model))
  with jax.set_mesh(mesh):
    cache, spread = paged(model, params), jax.device_put(params, place)
    for x in jax.tree.leaves(cache.layers, is_leaf=lambda x: hasattr(x, "kv")):
      if hasattr(x, "kv"):
        (heads,) = {s.data.shape[2] for s in x.kv.addressable_shards}
        assert heads == 8 // mesh.shape["tensor"]
    got, _ = read(model, spread, cache)
    text = step.lower(model, spread, *next(calls()), cache).compile().as_text()
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)
  # Pages travel nowhere.
  moved = support_hlo.collectives(text, mesh)
  assert moved and not [c for c in moved for s in c.shapes if COUNT in s]


@pytest.mark.slow
def test_the_model_says_the_same_by_the_kernels():
  """Appending and attending are a TPU's, interpreted; 8 tokens a page.

  The last row is nobody's, and has no pages.
  """
  model = support.model("gemma2", depth=2)
  params = support.params(model)
  where = jnp.array([[3, 0], [1, 5], [4, 2], [-1, -1]])
  cache = paged_cache(
    empty_pool(model, params, 6, 8), where, jnp.zeros(ROWS + 1, jnp.int32)
  )
  inputs = [
    (support.tokens(ROWS + 1, max(counts)), jnp.array([*counts, 0]))
    for counts in [*CALLS[:2], (1, 0, 1)]
  ]

  def run(params, cache, inputs):
    out = []
    for tokens, counts in inputs:
      hidden, cache = model.apply(
        {"params": params}, tokens, cache=cache, lengths=counts
      )
      alive = jnp.arange(tokens.shape[1]) < counts[:, None]
      out.append(jnp.where(alive[..., None], hidden, 0))
    return out

  want = jax.jit(run)(params, cache, inputs)
  with programs_for_a_tpu(), pltpu.force_tpu_interpret_mode():
    traced = jax.make_jaxpr(run)(params, cache, inputs)
  names = str(traced)
  assert "name=append_to_pages" in names and "name=decode_attention" in names
  got = jax.jit(jaxpr_as_fun(traced))(*jax.tree.leaves((params, cache, inputs)))
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
  "mask", [Mask.full(), Mask.causal((3, 2)), Mask.block_causal(4)]
)
def test_tokens_that_look_ahead_have_no_pages(mask):
  model = support.model(depth=1)
  params = support.params(model)
  with pytest.raises(UserError, match="pages: found a mask.*expected one"):
    model.apply(
      {"params": params},
      support.tokens(ROWS, 4),
      mask=mask,
      cache=paged(model, params),
    )


def test_tokens_come_behind_those_that_are_there():
  """Explicit positions are rejected; they would affect keys only."""
  model = support.model(depth=1)
  params = support.params(model)
  given = jnp.broadcast_to(jnp.arange(5, 9), (ROWS, 4))
  for positions, mask in (
    (given, None),
    (None, Mask.causal(q_positions=given)),
    (None, Mask.causal(kv_positions=given)),
  ):
    with pytest.raises(UserError, match="pages: found .* positions"):
      model.apply(
        {"params": params},
        support.tokens(ROWS, 4),
        positions=positions,
        mask=mask,
        cache=paged(model, params),
      )


def test_what_the_cache_of_a_model_holds():
  model = support.model("gemma2", depth=2)
  params = support.params(model)
  cache = paged(model, params)
  assert cache.capacity == SIZE * WIDTH
  assert pool_from_cache(cache).keys() == cache.layers.keys()
