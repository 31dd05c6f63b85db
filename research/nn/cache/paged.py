"""Keys and values in pages that rows share, in place of a slab for each row.

A `LayerCache` gives every row the room that the longest one needs. A pool has
pages (`kernels_pallas.decode_attention.pages`), a table says which of them are
a row's, in which order, and a row has as many as its tokens may come to fill.
Table and lengths are data: one compiled step serves rows of any lengths in any
pages.

A page's number stands for that page of every layer, so a row has one line of
one table. Who owns which page is decided outside of the program
(`page_allocator`); a page that nobody owns is neither read nor written.
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
from research.nn.attention_context import AttentionContext
from research.nn.cache import Cache
from research.nn.transformer import Transformer
from research.typing import Array, Bool, Float, Int, Params, UserError

CODES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
"""Pages of 8 bits, each token and head with a scale of its own."""

Pool = dict[str, dict[str, Pages]]
"""Run name -> layer name -> pages stacked over the run."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedLayer:
  """What a layer looks at: its pages, and which of them each row has.

  New tokens come behind those that their row has, in order; what they see is
  read from the pages, themselves included, as it is kept there.

  Attributes:
    pages: of one layer, or of a run of them behind a leading axis.
    some_queries: whether some of the new tokens may look and others not.
    table: `[..., B, W]`, pages of each row; behind the last that a row needs,
      or before the first that its window reaches, whatever.
  """

  some_queries: ClassVar[bool] = False
  pages: Pages
  table: Any

  @property
  def slots(self) -> int:
    """How many positions a row can have."""
    return self.table.shape[-1] * self.pages.size

  def attend(
    self,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    call: AttentionContext,
  ) -> tuple["PagedLayer", Float[Array, "B T N H"]]:
    """Returns the layer with new tokens in its pages, and what they see.

    Args:
      q, k, v: of the new tokens; those of padding are nowhere.
      call: what else there is to know.

    Raises:
      UserError: a mask under which tokens do not look back alone, or stand
        at positions of their own.
    """
    window = _window(call.mask)
    alive = call.positions >= 0
    new = jnp.sum(alive, axis=1, dtype=jnp.int32)
    rows = self.table, jnp.where(new > 0, call.length, 0)
    if q.shape[1] == 1:  # a token a row: where it is
      q, k, v = (x[:, 0] for x in (q, k, v))
    else:
      source, place = _order(alive)
      rows += (jnp.pad(jnp.cumsum(new), (1, 0)),)
      q, k, v = (x.reshape(-1, *x.shape[2:])[source] for x in (q, k, v))
    pages, y = _append_and_attend(
      self.pages, q, k, v, *rows, window=window, **call.options
    )
    if alive.shape[1] > 1:
      y = y[place]
    y = y.reshape(*alive.shape, *y.shape[1:])
    y = jnp.where(alive[..., None, None], y, 0)
    return PagedLayer(pages, self.table), y


def _window(mask: Mask) -> int | None:
  if mask.q_positions is not None or mask.kv_positions is not None:
    raise UserError(
      "pages: found a mask with positions, expected none: new tokens come "
      "behind those that their row has.\nGive lengths in place of positions, "
      "or use a cache without pages."
    )
  left, right = mask.window
  if mask.kind != "causal" or right or mask.q_segments is not None:
    raise UserError(
      f"pages: found a mask of kind {mask.kind!r}, window {mask.window}"
      f"{'' if mask.q_segments is None else ', with segments'}; expected one "
      "that looks back alone (causal).\nUse a cache without pages."
    )
  return None if left is None else left + 1


def _order(
  alive: Bool[Array, "B T"],
) -> tuple[Int[Array, " BT"], Int[Array, " BT"]]:
  """Returns which token comes where if padding goes last, and its inverse."""
  alive = alive.reshape(-1)
  place, count = jnp.cumsum(alive) - 1, alive.size
  source = jnp.zeros(count, jnp.int32)
  source = source.at[jnp.where(alive, place, count)].set(
    jnp.arange(count, dtype=jnp.int32), mode="drop"
  )
  return source, place


def _append_and_attend(pages, q, k, v, *rows, **options):
  """Returns the pages with new tokens, and what those see."""
  if not sharding.is_cut():
    pages = kernel_pages.append_to_pages(pages, k, v, *rows)
    return pages, paged_attention(q, pages, *rows, **options)
  # All rows share the pool, so each device has all of them, of its heads.
  cut = sharded.Cut(heads=sharding.cuts(k.shape, None, "kv_heads", None)[1])
  pages = sharded.sharded_append_to_pages(pages, k, v, *rows, cut=cut)
  return pages, sharded.sharded_paged_attention(
    q, pages, *rows, cut=cut, **options
  )


def empty_pool(
  model: Transformer,
  params: Params,
  count: int,
  size: int,
  dtype: str | None = None,
) -> Pool:
  """Returns pages of zeros for `params`' runs.

  Under a mesh each device has its heads of every page.

  Args:
    model: the Transformer.
    params: its parameters; the pool follows their runs.
    count: pages.
    size: tokens a page.
    dtype: `"int8"` or `"fp8"`; by default the model's.
  """
  kept = CODES.get(dtype, dtype or model.dtype)
  runs = model.stack.runs(params)

  def made(a, repeats):
    one = kernel_pages.empty_pages(count, a.kv_heads, size, a.head_dim, kept)
    kv, scale = (
      None if x is None else jnp.broadcast_to(x, (repeats, *x.shape))
      for x in (one.kv, one.scale)
    )
    kv = sharding.constrain(kv, None, None, "kv_heads", None, None)
    if scale is not None:
      scale = sharding.constrain(scale, None, None, None, "kv_heads", None)
    return dataclasses.replace(one, kv=kv, scale=scale)

  def pool():
    return {
      name: {
        f"layer{j}": made(block.attention, repeats)
        for j, block in enumerate(blocks)
      }
      for name, repeats, blocks in runs
    }

  return jax.jit(pool)()


def view(
  pool: Pool, table: Int[Array, "B W"], length: Int[Array, "B"]
) -> Cache:
  """Returns a model's cache of some rows, which the pool has pages of.

  Args:
    pool: all pages.
    table: pages of each row.
    length: tokens of each row that its pages hold.
  """

  def layer(pages):
    shape = pages.kv.shape[0], *table.shape
    return PagedLayer(pages, jnp.broadcast_to(table, shape))

  layers = jax.tree.map(layer, pool, is_leaf=lambda x: isinstance(x, Pages))
  return Cache(length, layers, fresh=False)


def pool_of(cache: Cache) -> Pool:
  """Returns the pages of a cache; inverts `view`."""
  return jax.tree.map(
    lambda layer: layer.pages,
    cache.layers,
    is_leaf=lambda x: isinstance(x, PagedLayer),
  )


def copied(pool: Pool, source: Int[Array, ""], target: Int[Array, ""]) -> Pool:
  """Returns the pool with a page's numbers in another page, in every layer."""

  def one(x):
    page = jax.lax.dynamic_index_in_dim(x, source, 1)
    return jax.lax.dynamic_update_index_in_dim(x, page, target, 1)

  return jax.tree.map(one, pool)
