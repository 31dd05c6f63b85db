"""Jitted programs of paged generation: prefill, insertion, decoding, copying.

The state of the rows is data, so between two calls any row may end and be
assigned to another prompt without recompilation.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from research.generation import generate
from research.generation.generated import NO_TOKEN
from research.generation.sampling import Sampling
from research.nn.cache import paged
from research.nn.transformer import Transformer
from research.typing import Array, Float, Int, Params, PRNGKey


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """Per-row decoding state besides the pages; arrays are `[R]`.

  Attributes:
    length: number of tokens in pages: all of a row's but the last.
    token: the last token.
    step: number of generated tokens.
    limit: maximum number of generated tokens.
    done: whether the row has ended or is unassigned.
    keys: random keys.
    occurred: `[R, V]`, whether each token occurs in the prompt or the generated
      text; None without a repetition penalty.
  """

  length: Any
  token: Any
  step: Any
  limit: Any
  done: Any
  keys: Any
  occurred: Any = None


def empty_rows(count: int, key: PRNGKey, vocab: int | None = None) -> Rows:
  """Returns the state of unassigned rows.

  Args:
    count: R.
    key: any key; a placeholder.
    vocab: V, if `occurred` is needed, else None.
  """
  # Separate arrays: a buffer may be donated only once.
  return Rows(
    *(jnp.zeros(count, jnp.int32) for _ in range(4)),
    jnp.ones(count, bool),
    jnp.broadcast_to(key, (count,)),
    None if vocab is None else jnp.zeros((count, vocab), bool),
  )


@functools.partial(
  jax.jit, static_argnames=("model",), donate_argnames=("pool",)
)
def prefill(
  model: Transformer,
  params: Params,
  pool: paged.Pool,
  table: Int[Array, "1 W"],
  length: Int[Array, "1"],
  tokens: Int[Array, "1 T"],
  count: Int[Array, "1"],
) -> tuple[Float[Array, "1 D"], paged.Pool]:
  """Prefills a piece of a prompt.

  Args:
    model: the Transformer.
    params: its parameters.
    pool: all pages; donated.
    table: page table of the row.
    length: number of tokens of the row before the piece.
    tokens: the piece, right-padded.
    count: number of tokens in the piece.

  Returns:
    The hidden state of the piece's last token, and the updated pool.
  """
  cache = paged.paged_cache(pool, table, length)
  hidden, cache = model.apply(
    {"params": params}, tokens, cache=cache, lengths=count
  )
  return hidden[jnp.arange(1), count - 1], paged.pool_from_cache(cache)


@functools.partial(
  jax.jit, static_argnames=("model",), donate_argnames=("rows",)
)
def insert_row(
  model: Transformer,
  params: Params,
  rows: Rows,
  row: Int[Array, ""],
  new: Rows,
  hidden: Float[Array, "1 D"],
  sampling: Sampling,
  stop: Int[Array, "E"],
) -> tuple[Rows, Int[Array, ""]]:
  """Samples a prefilled row's first token and inserts the row into the batch.

  Args:
    model: the Transformer.
    params: its parameters.
    rows: state of all rows; donated.
    row: index to insert at.
    new: state of the new row, R = 1; its token, step and done are set here.
    hidden: hidden state of its prompt's last token.
    sampling: sampling parameters.
    stop: tokens that end a row.

  Returns:
    The updated state of all rows, and the first token.
  """
  token, occurred = generate.sample_next(
    model, params, hidden, sampling, new.keys, 0, new.occurred
  )
  step = jnp.ones_like(new.limit)
  done = generate.has_ended(token, step, new.limit, stop)
  new = Rows(new.length, token, step, new.limit, done, new.keys, occurred)
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
  """Decodes up to `size` tokens for all rows; stops early when all have ended.

  Rows that have ended write nothing and yield `NO_TOKEN`.

  Args:
    model: the Transformer.
    params: its parameters.
    pool, rows: current pages and row state; donated.
    table: page table of each row.
    sampling: sampling parameters.
    stop: tokens that end a row.
    size: number of tokens.

  Returns:
    The updated pages and rows, and the new tokens.
  """

  def unfinished(carry):
    i, _, rows, _ = carry
    return (i < size) & ~jnp.all(rows.done)

  def step(carry):
    i, pool, rows, out = carry
    hidden, cache = model.apply(
      {"params": params},
      rows.token[:, None],
      cache=paged.paged_cache(pool, table, rows.length),
      lengths=jnp.where(rows.done, 0, 1),
    )
    token, occurred = generate.sample_next(
      model, params, hidden[:, 0], sampling, rows.keys, rows.step, rows.occurred
    )
    shown = jnp.where(rows.done, NO_TOKEN, token)
    out = jax.lax.dynamic_update_slice_in_dim(out, shown[:, None], i, axis=1)
    after = rows.step + 1
    done = rows.done | generate.has_ended(token, after, rows.limit, stop)
    rows = Rows(
      cache.length, token, after, rows.limit, done, rows.keys, occurred
    )
    return i + 1, paged.pool_from_cache(cache), rows, out

  out = jnp.full((len(rows.token), size), NO_TOKEN, jnp.int32)
  carry = jax.lax.while_loop(unfinished, step, (0, pool, rows, out))
  return carry[1:]


copy_page = jax.jit(paged.copy_page, donate_argnames=("pool",))
