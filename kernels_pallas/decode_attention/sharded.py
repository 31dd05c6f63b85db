"""Decode attention on a mesh: each device has its own rows and key heads.

Rows and heads are independent, so nothing is gathered. Pages are sharded by key
heads. If rows are sharded too, the pages are as many pools as there are shards
of rows, one after another, and a row's table counts from 0 in its own pool.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from kernels_pallas.decode_attention import api, pages, ragged
from kernels_pallas.decode_attention.pages import Pages

MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class DecodeSharding:
  """Which mesh axes shard which axes of the operands; none by default.

  Attributes:
    rows: Shard the rows of all operands; their sizes together divide R.
    heads: Shard the key heads (K) and the query heads (N).
  """

  rows: MeshAxes = ()
  heads: MeshAxes = ()


def sharded_decode_attention(
  q: Float[Array, "B N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K Hv"],
  lengths: Int[Array, " B"],
  *,
  sharding: DecodeSharding,
  sinks: Float[Array, " N"] | None = None,
  return_lse: bool = False,
  **options: Any,
) -> Any:
  """`decode_attention` under the current mesh, over all of its axes.

  Args:
    q: Queries.
    k: Keys.
    v: Values.
    lengths: Tokens in the cache.
    sharding: Mesh axes that shard the operands.
    sinks: One logit per head.
    return_lse: Also return the log-sum-exp.
    **options: Options of `decode_attention`.

  Raises:
    ValueError: The axes do not divide rows or heads.
  """
  _divide(sharding, q.shape[0], k.shape[2])

  def local(q, k, v, lengths, sinks):
    return api.decode_attention(
      q, k, v, lengths, sinks=sinks, return_lse=return_lse, **options
    )

  own = P(sharding.rows, sharding.heads)
  memory = P(sharding.rows, None, sharding.heads)
  return _map(
    local,
    in_specs=(own, memory, memory, P(sharding.rows), P(sharding.heads)),
    out_specs=(own, own) if return_lse else own,
  )(q, k, v, lengths, sinks)


def sharded_paged_attention(
  q: Float[Array, "T N H"],
  storage: Pages,
  table: Int[Array, "R W"],
  kv_lens: Int[Array, " R"],
  cu_q_lens: Int[Array, " R1"] | None = None,
  *,
  sharding: DecodeSharding,
  sinks: Float[Array, " N"] | None = None,
  return_lse: bool = False,
  **options: Any,
) -> Any:
  """`paged_attention` under the current mesh, over all of its axes.

  Args:
    q: Queries.
    storage: The pages.
    table: Pages of each row.
    kv_lens: Tokens of each row.
    cu_q_lens: Where each row's queries start; None if rows are sharded, which
      need one token per row.
    sharding: Mesh axes that shard the operands.
    sinks: One logit per head.
    return_lse: Also return the log-sum-exp.
    **options: Options of `paged_attention`.

  Raises:
    ValueError: As in `paged_attention`; the axes do not divide rows or heads.
  """
  window = options.get("window")
  _check(sharding, storage, q.shape[0], table, kv_lens, cu_q_lens, window)

  def local(q, storage, table, kv_lens, cu_q_lens, sinks):
    return api.paged_attention(
      q,
      storage,
      table,
      kv_lens,
      cu_q_lens,
      sinks=sinks,
      return_lse=return_lse,
      **options,
    )

  own, rows = P(sharding.rows, sharding.heads), P(sharding.rows)
  return _map(
    local,
    in_specs=(
      own,
      _specs(storage, sharding),
      rows,
      rows,
      P(),
      P(sharding.heads),
    ),
    out_specs=(own, own) if return_lse else own,
  )(q, storage, table, kv_lens, cu_q_lens, sinks)


def sharded_append_to_pages(
  storage: Pages,
  k: Float[Array, "T K H"],
  v: Float[Array, "T K Hv"],
  table: Int[Array, "R W"],
  kv_lens: Int[Array, " R"],
  cu_q_lens: Int[Array, " R1"] | None = None,
  *,
  sharding: DecodeSharding,
) -> Pages:
  """`append_to_pages` under the current mesh, over all of its axes.

  Args:
    storage: The pages.
    k: New keys.
    v: New values.
    table: Pages of each row.
    kv_lens: Tokens of each row.
    cu_q_lens: As in `sharded_paged_attention`.
    sharding: Mesh axes that shard the operands.
  """
  _check(sharding, storage, k.shape[0], table, kv_lens, cu_q_lens, 1)
  own, rows, memory = (
    P(sharding.rows, sharding.heads),
    P(sharding.rows),
    _specs(storage, sharding),
  )
  return _map(
    pages.append_to_pages,
    in_specs=(memory, own, own, rows, rows, P()),
    out_specs=memory,
  )(storage, k, v, table, kv_lens, cu_q_lens)


# Varying axes are not checked: Pallas' interpreter does not track them, and
# there is no gradient that could be wrong.
_map = functools.partial(jax.shard_map, check_vma=False)


def _specs(storage: Pages, sharding: DecodeSharding) -> Pages:
  scale = (
    None if storage.scale is None else P(sharding.rows, None, sharding.heads)
  )
  return dataclasses.replace(
    storage, kv=P(sharding.rows, sharding.heads), scale=scale
  )


def _check(
  sharding, storage, tokens, table, kv_lens, cu_q_lens, window
) -> None:
  pages.check_pages(storage)
  parts = _divide(sharding, kv_lens.shape[0], storage.kv.shape[1])
  if sharding.rows and cu_q_lens is not None:
    raise ValueError(
      f"cu_q_lens: found with rows sharded by {sharding.rows}, expected none "
      "(a token a row): which tokens a device has would depend on data"
    )
  if storage.count % parts:
    raise ValueError(
      f"pages: found {storage.count} pages in {parts} pools, expected as many "
      "in each"
    )
  memory = storage.count // parts, storage.size
  ragged.make_rows(tokens, table, kv_lens, cu_q_lens, memory, window)


def _divide(sharding: DecodeSharding, rows: int, kv_heads: int) -> int:
  """Returns the number of row shards; raises if axes divide a size unevenly."""
  sizes = jax.sharding.get_abstract_mesh().shape
  for what, names, size in (
    ("rows", sharding.rows, rows),
    ("heads", sharding.heads, kv_heads),
  ):
    parts = math.prod(sizes[name] for name in names)
    if size % parts:
      raise ValueError(
        f"sharding.{what}: found {size} {what} in {parts} parts by {names}, "
        "expected as many in each"
      )
  return math.prod(sizes[name] for name in sharding.rows)
