"""Programs of generation over pages: a piece of a prompt, a chunk of tokens.

Rows are data, so that any of them may end, and be another prompt's, between two
calls.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from research.generation import generate
from research.generation.generated import NONE
from research.generation.sampling import Sampling
from research.nn.cache import paged
from research.nn.transformer import Transformer
from research.typing import Array, Float, Int, Params, PRNGKey


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """What decoding carries beside the pages, `[R]` each.

  Attributes:
    length: tokens in pages: all of a row's but the last.
    token: the last ones.
    step: how many tokens a row has generated.
    limit: how many it may.
    done: which rows have ended, or are nobody's.
    keys: of their samples.
    seen: `[R, V]`, tokens in prompt or text, or None where nobody asks.
  """

  length: Any
  token: Any
  step: Any
  limit: Any
  done: Any
  keys: Any
  seen: Any = None


def nobody(count: int, key: PRNGKey, vocab: int | None = None) -> Rows:
  """Returns rows that are no prompt's.

  Args:
    count: R.
    key: any.
    vocab: V, if tokens that were seen are asked for.
  """
  # An array each: what is donated may not be given twice.
  return Rows(
    *(jnp.zeros(count, jnp.int32) for _ in range(4)),
    jnp.ones(count, bool),
    jnp.broadcast_to(key, (count,)),
    None if vocab is None else jnp.zeros((count, vocab), bool),
  )


@functools.partial(
  jax.jit, static_argnames=("model",), donate_argnames=("pool",)
)
def read(
  model: Transformer,
  params: Params,
  pool: paged.Pool,
  table: Int[Array, "1 W"],
  length: Int[Array, "1"],
  tokens: Int[Array, "1 T"],
  count: Int[Array, "1"],
) -> tuple[Float[Array, "1 D"], paged.Pool]:
  """Returns the hidden state of a piece's last token, and the pool with it.

  Args:
    model: the Transformer.
    params: its parameters.
    pool: pages, whose memory is used again.
    table: the row's.
    length: its tokens before these.
    tokens: the piece, padded on the right.
    count: its tokens.
  """
  cache = paged.view(pool, table, length)
  hidden, cache = model.apply(
    {"params": params}, tokens, cache=cache, lengths=count
  )
  return hidden[jnp.arange(1), count - 1], paged.pool_of(cache)


@functools.partial(
  jax.jit, static_argnames=("model",), donate_argnames=("rows",)
)
def enter(
  model: Transformer,
  params: Params,
  rows: Rows,
  row: Int[Array, ""],
  new: Rows,
  hidden: Float[Array, "1 D"],
  sampling: Sampling,
  stop: Int[Array, "E"],
) -> tuple[Rows, Int[Array, ""]]:
  """Returns all rows with one that has read its prompt, and its first token.

  Args:
    model: the Transformer.
    params: its parameters.
    rows: of all.
    row: which one it becomes.
    new: what it is, of one row; its token, step and end follow.
    hidden: of its prompt's last token.
    sampling: how tokens are chosen.
    stop: tokens that end a row.
  """
  token, seen = generate.choose(
    model, params, hidden, sampling, new.keys, 0, new.seen
  )
  step = jnp.ones_like(new.limit)
  done = generate.ended(token, step, new.limit, stop)
  new = Rows(new.length, token, step, new.limit, done, new.keys, seen)
  rows = jax.tree.map(lambda old, x: old.at[row].set(x[0]), rows, new)
  return rows, token[0]


@functools.partial(
  jax.jit, static_argnames=("model", "size"), donate_argnames=("pool", "rows")
)
def decode(
  model: Transformer,
  params: Params,
  pool: paged.Pool,
  rows: Rows,
  table: Int[Array, "R W"],
  sampling: Sampling,
  stop: Int[Array, "E"],
  size: int,
) -> tuple[paged.Pool, Rows, Int[Array, "R C"]]:
  """Returns pages and rows `size` tokens on, and those tokens.

  Rows that have ended get `NONE`, and write nothing; the loop ends with the
  last of them.

  Args:
    model: the Transformer.
    params: its parameters.
    pool, rows: as they are; their memory is used again.
    table: pages of each row.
    sampling: how tokens are chosen.
    stop: tokens that end a row.
    size: how many tokens.
  """

  def unfinished(carry):
    i, _, rows, _ = carry
    return (i < size) & ~jnp.all(rows.done)

  def step(carry):
    i, pool, rows, out = carry
    hidden, cache = model.apply(
      {"params": params},
      rows.token[:, None],
      cache=paged.view(pool, table, rows.length),
      lengths=jnp.where(rows.done, 0, 1),
    )
    token, seen = generate.choose(
      model, params, hidden[:, 0], sampling, rows.keys, rows.step, rows.seen
    )
    shown = jnp.where(rows.done, NONE, token)
    out = jax.lax.dynamic_update_slice_in_dim(out, shown[:, None], i, axis=1)
    after = rows.step + 1
    done = rows.done | generate.ended(token, after, rows.limit, stop)
    rows = Rows(cache.length, token, after, rows.limit, done, rows.keys, seen)
    return i + 1, paged.pool_of(cache), rows, out

  out = jnp.full((len(rows.token), size), NONE, jnp.int32)
  carry = jax.lax.while_loop(unfinished, step, (0, pool, rows, out))
  return carry[1:]


copy = jax.jit(paged.copied, donate_argnames=("pool",))
