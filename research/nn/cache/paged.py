"""Paged key/value cache: rows share a pool of pages (PagedAttention).

A `LayerCache` reserves as many slots for every row as the longest row needs.
Here, keys and values are stored in a pool of pages
(`kernels_pallas.decode_attention.pages`), and a page table lists each row's
pages in order. Table and lengths are data, so one compiled step serves rows of
any length in any pages.

A page number refers to that page in every layer, so each row has a single line
in a single table. Pages are assigned to rows outside of the compiled program
(`page_allocator`); unassigned pages are neither read nor written.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kernels_pallas.decode_attention import pages as kernel_pages
from kernels_pallas.decode_attention import sharded
from kernels_pallas.decode_attention.api import paged_attention
from kernels_pallas.decode_attention.pages import Pages
from kernels_pallas.masks import Mask
from research import sharding
from research.nn.attention_context import (
  AttentionContext,
  attend,
  with_positions,
)
from research.nn.cache import Cache
from research.nn.transformer import Transformer
from research.typing import Array, Bool, Float, Int, Params, UserError

CODE_DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
"""8-bit page dtypes; each token and head has its own scale."""

Pool = dict[str, dict[str, Pages]]
"""Run name -> layer name -> `Pages` stacked over the run."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedLayer:
  """A layer's pages, and the page table of the rows.

  New tokens are appended to their row in order. Queries read keys and values
  from the pages, including their own, in the precision of the pages. Kernels
  read pages where they lie, and only look back (causal); under a mask of
  intervals (a prompt with images), rows are copied together first.

  Attributes:
    pages: pages of one layer, or of a run of layers on a leading axis.
    some_queries: whether the queries may be a subset of the new tokens.
    table: `[..., B, W]`, page numbers of each row. Entries after the last page
      that a row needs, or before the first one in its window, are arbitrary.
  """

  some_queries: ClassVar[bool] = False
  pages: Pages
  table: Any

  @property
  def slots(self) -> int:
    """The maximum number of positions of a row."""
    return self.table.shape[-1] * self.pages.size

  def attend(
    self,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    context: AttentionContext,
  ) -> tuple["PagedLayer", Float[Array, "B T N H"]]:
    """Appends new tokens to the pages and returns the attention output.

    Args:
      q, k, v: queries, keys and values of the new tokens; padding is ignored.
      context: positions, mask and options of the call.

    Raises:
      UserError: the mask is neither causal nor one of intervals, or has
        positions or segments.
    """
    _check(context.mask)
    alive = context.positions >= 0
    new = jnp.sum(alive, axis=1, dtype=jnp.int32)
    rows = self.table, jnp.where(new > 0, context.length, 0)
    place, unordered = None, q
    if q.shape[1] == 1:  # one token per row: already in order
      q, k, v = (x[:, 0] for x in (q, k, v))
    else:
      source, place = _order(alive)
      rows += (jnp.pad(jnp.cumsum(new), (1, 0)),)
      q, k, v = (x.reshape(-1, *x.shape[2:])[source] for x in (q, k, v))
    pages = _append(self.pages, k, v, *rows)
    if context.mask.kind == "intervals":
      y = _attend_to_copy(pages, unordered, *rows[:2], context)
      return PagedLayer(pages, self.table), y
    left, _ = context.mask.window
    window = None if left is None else left + 1
    y = _attend(pages, q, *rows, window=window, **context.options)
    if place is not None:
      y = y[place]
    y = y.reshape(*alive.shape, *y.shape[1:])
    y = jnp.where(alive[..., None, None], y, 0)
    return PagedLayer(pages, self.table), y

  def store(self, k: Any, v: Any, context: AttentionContext) -> Any:
    """Raises UserError: pages are not shared among layers."""
    raise UserError(
      "pages: found layers that lend their keys and values to others, expected"
      " layers with their own; use a cache without pages."
    )


def _check(mask: Mask) -> None:
  if mask.q_positions is not None or mask.kv_positions is not None:
    raise UserError(
      "pages: found a mask with positions, expected none: new tokens are "
      "appended to their row.\nGive lengths in place of positions, "
      "or use a cache without pages."
    )
  ahead = mask.kind != "causal" or mask.window[1]
  if mask.kind != "intervals" and ahead or mask.q_segments is not None:
    raise UserError(
      f"pages: found a mask of kind {mask.kind!r}, window {mask.window}"
      f"{'' if mask.q_segments is None else ', with segments'}; expected one "
      "that only looks back (causal) or one of intervals, without segments.\n"
      "Use a cache without pages."
    )


def _order(
  alive: Bool[Array, "B T"],
) -> tuple[Int[Array, " BT"], Int[Array, " BT"]]:
  """Returns the permutation that moves padding last, and its inverse."""
  alive = alive.reshape(-1)
  place, count = jnp.cumsum(alive) - 1, alive.size
  source = jnp.zeros(count, jnp.int32)
  source = source.at[jnp.where(alive, place, count)].set(
    jnp.arange(count, dtype=jnp.int32), mode="drop"
  )
  return source, place


def _append(pages, k, v, *rows):
  """Returns the pages with new tokens."""
  if not sharding.is_cut():
    return kernel_pages.append_to_pages(pages, k, v, *rows)
  return sharded.sharded_append_to_pages(
    pages, k, v, *rows, sharding=_cut(pages)
  )


def _attend(pages, q, *rows, **options):
  """Returns the output of causal attention to pages, where they lie."""
  if not sharding.is_cut():
    return paged_attention(q, pages, *rows, **options)
  return sharded.sharded_paged_attention(
    q, pages, *rows, sharding=_cut(pages), **options
  )


def _cut(pages):
  """Each device computes all rows, which share the pool, for its heads."""
  names = (None, "kv_heads", None, None)
  return sharded.DecodeSharding(
    heads=sharding.activation_axes(pages.kv.shape, *names)[1]
  )


def _attend_to_copy(pages, q, table, length, context):
  """Returns the output of attention to a copy of each row's pages."""
  k, v = kernel_pages.gather_pages(pages, table, q.dtype)
  slot, positions = jnp.arange(k.shape[1]), context.positions
  # Elsewhere are other rows' tokens, or anything: NaN may not reach a product.
  mine = slot < length[:, None]
  left, _ = context.mask.window
  if left is not None:
    first = jnp.min(jnp.where(positions < 0, k.shape[1], positions), axis=1)
    mine &= slot >= first[:, None] - left
  mask = with_positions(context.mask, positions, jnp.where(mine, slot, -1))
  return attend(q, k, v, mask=mask, **context.options)


def empty_pool(
  model: Transformer,
  params: Params,
  count: int,
  size: int,
  dtype: str | None = None,
) -> Pool:
  """Allocates a pool of zeroed pages for every layer.

  Under a mesh, each device stores its own heads of every page.

  Args:
    model: the Transformer.
    params: its parameters; the pool has the same runs.
    count: number of pages.
    size: tokens per page.
    dtype: `"int8"`, `"fp8"`, or None for the model's dtype.
  """
  kept = CODE_DTYPES.get(dtype, dtype or model.dtype)
  runs = model.stack.runs(params)

  def made(a, repeats):
    pages = kernel_pages.empty_pages(count, a.kv_heads, size, a.head_dim, kept)
    kv, scale = (
      None if x is None else jnp.broadcast_to(x, (repeats, *x.shape))
      for x in (pages.kv, pages.scale)
    )
    kv = sharding.constrain(kv, None, None, "kv_heads", None, None)
    if scale is not None:
      scale = sharding.constrain(scale, None, None, None, "kv_heads", None)
    return dataclasses.replace(pages, kv=kv, scale=scale)

  def pool():
    return {
      name: {
        f"layer{j}": made(block.attention, repeats)
        for j, block in enumerate(blocks)
      }
      for name, repeats, blocks in runs
    }

  return jax.jit(pool)()


def paged_cache(
  pool: Pool, table: Int[Array, "B W"], length: Int[Array, "B"]
) -> Cache:
  """Returns a model cache for rows whose pages are in the pool.

  Args:
    pool: all pages.
    table: page numbers of each row.
    length: number of tokens in each row's pages.
  """

  def layer(pages):
    shape = pages.kv.shape[0], *table.shape
    return PagedLayer(pages, jnp.broadcast_to(table, shape))

  layers = jax.tree.map(layer, pool, is_leaf=lambda x: isinstance(x, Pages))
  return Cache(length, layers, fresh=False)


def pool_from_cache(cache: Cache) -> Pool:
  """Returns the pool inside a cache; the inverse of `paged_cache`."""
  return jax.tree.map(
    lambda layer: layer.pages,
    cache.layers,
    is_leaf=lambda x: isinstance(x, PagedLayer),
  )


def copy_page(
  pool: Pool, source: Int[Array, ""], target: Int[Array, ""]
) -> Pool:
  """Returns the pool with page `source` copied to page `target`."""

  def one(x):
    page = jax.lax.dynamic_index_in_dim(x, source, 1)
    return jax.lax.dynamic_update_index_in_dim(x, page, target, 1)

  return jax.tree.map(one, pool)
