"""A Transformer under masks of intervals: caches, pages, trees and packing."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode_attention.pages import Pages
from kernels_pallas.flash_attention import flash_attention
from kernels_pallas.masks import (
  Mask,
  bidirectional_tokens,
  image_blocks,
  message_tree,
  tree_positions,
)
from research.nn.attention_context import AttentionContext, select_queries
from research.nn.cache.paged import PagedLayer, empty_pool, paged_cache
from research.nn.transformer import init_cache
from research.typing import UserError
from tests import support, support_mesh

ROWS, SIZE, WIDTH = 3, 4, 6
# Tokens of each row in each call: prompts with images, more of them, then one
# by one without. Pieces are longer than the layers' window of 6.
CALLS = [(8, 4, 1), (8, 0, 7), (1, 1, 1), (1, 0, 1)]


def close(got, want):
  # Two layers in float32, whose sums are taken in another order.
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)


@functools.partial(
  jax.jit, static_argnums=0, compiler_options=support_mesh.QUICKLY
)
def logits(model, params, tokens, positions=None, mask=None, **how):
  hidden, cache = model.apply(
    {"params": params}, tokens, positions, mask, **how
  )
  return model.apply({"params": params}, hidden, method="logits"), cache


def images(n, length):
  """Images of a call, at most 7 tokens each, with ids of their own."""
  ids = np.full((ROWS, length), -1, np.int32)
  if length > 1:
    ids[0, 1:3], ids[0, 3:7], ids[1, :3], ids[2, 2:] = 0, 1, 2, 3
  return np.where(ids < 0, ids, ids + 4 * n)


def calls():
  """Yields tokens, padded, which images they are of, and how many of a row."""
  for n, counts in enumerate(CALLS):
    ids = images(n, max(counts))
    live = np.arange(ids.shape[1]) < np.array(counts)[:, None]
    ids = jnp.asarray(np.where(live, ids, -1))
    yield support.tokens(ROWS, max(counts), seed=n), ids, jnp.array(counts)


def pages(model, params):
  """Pages in random order, with NaN in all of them."""
  order = np.random.default_rng(0).permutation(ROWS * WIDTH)
  pool = jax.tree.map(
    lambda x: jnp.full_like(x, jnp.nan),
    empty_pool(model, params, ROWS * WIDTH, SIZE),
  )
  table = jnp.asarray(order.reshape(ROWS, WIDTH), jnp.int32)
  return paged_cache(pool, table, jnp.zeros(ROWS, jnp.int32))


CACHES = {
  "contiguous": lambda *model: init_cache(*model, ROWS, SIZE * WIDTH),
  "pages": pages,
}


def last_step(total):
  """Two intervals of each row's last token, which does not see the middle."""
  total = jnp.asarray(total)
  nothing = jnp.zeros_like(total)
  bounds = nothing, nothing + 3, total - 4, total
  return jnp.stack(bounds, axis=1)[..., None]


@functools.cache
def in_one_call():
  """Each row in one forward pass with one mask, all of its calls in a row."""
  model = support.model("gemma2", depth=2)
  params = support.params(model)
  total = np.sum(CALLS, axis=0)
  tokens = np.zeros((ROWS, total.max()), np.int32)
  ids, at = np.full_like(tokens, -1), np.zeros(ROWS, int)
  for some, theirs, counts in calls():
    for row, n in enumerate(np.asarray(counts)):
      tokens[row, at[row] : at[row] + n] = some[row, :n]
      ids[row, at[row] : at[row] + n] = theirs[row, :n]
    at += np.asarray(counts)
  whole = jnp.asarray(tokens)
  bounds = jnp.pad(
    image_blocks(jnp.asarray(ids)).bounds, ((0, 0), (0, 2), (0, 0))
  )
  rows = np.flatnonzero(CALLS[-1])
  at = rows, slice(None), total[rows] - 1
  bounds = bounds.at[at].set(last_step(total)[rows, :, 0])
  want, _ = logits(model, params, whole, mask=Mask.intervals(bounds))
  ends = jnp.arange(1, total.max() + 1)
  causal = Mask.intervals(bounds.at[:, 1, :-1].set(ends[:-1]))
  causal, _ = logits(model, params, whole, mask=causal)
  live = np.arange(total.max()) < total[:, None]
  # Images in the first piece change all that comes behind, steps included.
  change = np.abs(want - causal)[0].max(-1)
  assert change[total[0] - 2] > 0.1 and change[total[0] - 1] > 0.1
  return (
    model,
    params,
    [row[keep] for row, keep in zip(want, live, strict=True)],
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHES)
@pytest.mark.sample(2, 1)
def test_pieces_then_steps_are_one_forward_pass(name):
  model, params, want = in_one_call()
  cache, got = CACHES[name](model, params), [[] for _ in range(ROWS)]
  for n, (tokens, ids, counts) in enumerate(calls()):
    # Steps need no mask, since they see all that came before, but may have one.
    mask = None
    if tokens.shape[1] > 1:
      mask = image_blocks(ids, start=cache.length)
    elif n == len(CALLS) - 1:
      mask = Mask.intervals(last_step(cache.length + 1))
    found, cache = logits(
      model, params, tokens, mask=mask, cache=cache, lengths=counts
    )
    for row, n in enumerate(np.asarray(counts)):
      got[row].append(found[row, :n])
  for row in range(ROWS):
    close(np.concatenate(got[row]), want[row])


def test_masks_of_other_coordinates_take_no_cache_with_tokens():
  model, params, _ = in_one_call()
  mask = bidirectional_tokens(jnp.ones((ROWS, 4), bool))
  slots = init_cache(model, params, ROWS, 8)
  for cache in (
    dataclasses.replace(slots, fresh=False),
    pages(model, params),
  ):
    with pytest.raises(UserError, match="found kv_positions with a cache"):
      model.apply(
        {"params": params}, support.tokens(ROWS, 4), mask=mask, cache=cache
      )
  with pytest.raises(ValueError, match="window .5, None. with kv_positions"):
    model.apply({"params": params}, support.tokens(ROWS, 4), mask=mask)


NODES = jnp.array([[0, 0, 0, 0, 1, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, -1]])
PARENTS = jnp.array([[-1, 0, 0, 2, 2]])
PATHS = (0, 1), (0, 2, 3), (0, 2, 4)  # of 8 tokens each


@pytest.mark.slow
def test_branches_of_a_tree_are_sequences_of_their_own():
  model = support.model(depth=2)
  params, nodes = support.params(model), np.asarray(NODES[0])
  tokens = support.tokens(1, len(nodes))
  got, _ = logits(
    model,
    params,
    tokens,
    tree_positions(NODES, PARENTS, 3),
    message_tree(NODES, PARENTS, 3),
  )
  at = np.stack([np.flatnonzero(np.isin(nodes, path)) for path in PATHS])
  alone, _ = logits(model, params, tokens[0, at])
  close(got[0, at], alone)


def test_packed_images_are_those_of_rows_alone():
  """The first row ends in the id with which the second begins."""
  model = support.model("gemma2", depth=2)
  params, n = support.params(model), 8
  ids = jnp.array([[-1, 0, 0, 0, 0, -1, 7, 7], [7, 7, 7, -1, -1, 2, 2, -1]])
  tokens = support.tokens(2, n)
  alone, _ = logits(model, params, tokens, mask=image_blocks(ids))
  segments = jnp.repeat(jnp.arange(2), n)[None]
  packed, _ = logits(
    model,
    params,
    tokens.reshape(1, -1),
    jnp.tile(jnp.arange(n), 2)[None],
    image_blocks(ids.reshape(1, -1), segments=segments),
  )
  close(packed.reshape(alone.shape), alone)


def test_selected_queries_have_their_own_intervals():
  ids, keep = jnp.asarray(images(0, 9)), jnp.array([[2, 8], [0, 5], [7, 3]])
  for mask in (
    image_blocks(ids, (3, None)),
    bidirectional_tokens(ids >= 0),
    Mask.intervals(jnp.arange(18).reshape(1, 2, 9)),
  ):
    every = jnp.broadcast_to(mask.visible(9, 9), (ROWS, 9, 9))
    some = select_queries(mask, keep, 9)
    some.check(ROWS, 2, 9)
    np.testing.assert_array_equal(
      some.visible(2, 9), jnp.take_along_axis(every, keep[..., None], axis=1)
    )


def test_pages_before_the_window_may_hold_anything():
  """Rows of windowed layers release them: their content is another row's."""
  rng = np.random.default_rng(0)
  k, v = jnp.asarray(rng.standard_normal((2, 1, 9, 2, 8)), jnp.float32)
  q = jnp.asarray(rng.standard_normal((1, 3, 4, 8)), jnp.float32)
  ids = jnp.array([[-1, 0, 0]])
  table = jnp.array([[1, 0, 2]])

  def attend(before):
    """Three tokens behind six, of which the window reaches two."""
    kv = jnp.concatenate([k, v], axis=-1)[0].swapaxes(0, 1)
    kv = kv.at[:, :4].set(before)  # a page
    stored = jnp.zeros((3, 2, 4, 16)).at[1].set(kv[:, :4])
    stored = stored.at[0, :, :2].set(kv[:, 4:6])
    mask = image_blocks(ids, (2, None), start=jnp.array([6]))
    where = jnp.array([[6, 7, 8]])
    context = AttentionContext(where, where, jnp.array([9]), mask, False, 3)
    layer = PagedLayer(Pages(stored, None, 8), table)
    return layer.attend(q, k[:, 6:], v[:, 6:], context)[1]

  clean = attend(0.0)
  chex.assert_trees_all_equal(attend(jnp.nan), clean)
  local = Mask.intervals(
    image_blocks(ids, start=jnp.array([6])).bounds, (2, None), offset=6
  )
  close(clean, flash_attention(q, k, v, mask=local, backend="reference"))
