"""Jitted programs of paged generation: prefill, insertion, decoding, copying.

The state of the rows is data, so between two calls any row may end and be
assigned to another prompt without recompilation.
"""

import functools

import jax
import jax.numpy as jnp

from research import weights
from research.generation import decoding
from research.generation.decoding import (
  GeneratedTokens,
  PromptMask,
  Rows,
  State,
)
from research.generation.sampling import Sampling
from research.nn.cache import paged
from research.nn.transformer import Transformer
from research.typing import Array, Float, Int, Params, PRNGKey


def empty_rows(count: int, key: PRNGKey, vocab: int | None = None) -> Rows:
  """Returns the state of unassigned rows, which have ended.

  Args:
    count: R.
    key: any key; a placeholder.
    vocab: V, if `occurred` is needed, else None.
  """
  # Separate arrays: a buffer may be donated only once.
  token, step, limit = (jnp.zeros(count, jnp.int32) for _ in range(3))
  return Rows(
    token=token,
    step=step,
    limit=limit,
    done=jnp.ones(count, bool),
    keys=jnp.broadcast_to(key, (count,)),
    occurred=None if vocab is None else jnp.zeros((count, vocab), bool),
  )


@functools.partial(
  jax.jit, static_argnames=("model", "mask"), donate_argnames=("pool",)
)
def prefill(
  model: Transformer,
  params: Params,
  pool: paged.Pool,
  table: Int[Array, "1 W"],
  length: Int[Array, "1"],
  tokens: Int[Array, "1 T"],
  count: Int[Array, "1"],
  prompt: Int[Array, "1"] | None = None,
  mask: PromptMask | None = None,
) -> tuple[Float[Array, "1 D"], paged.Pool]:
  """Prefills a piece of a prompt.

  Args:
    pool: all pages; donated.
    table: page table of the row.
    length: number of tokens of the row before the piece.
    tokens: the piece, right-padded.
    count: number of tokens in the piece.
    prompt: its index, if weights are per row: a row for each prompt.
    mask: what tokens of the piece, a whole prompt, see of each other; None for
      causal.

  Returns:
    The hidden state of the piece's last token, and the updated pool.
  """
  params = _of_prompts(params, prompt)
  cache = paged.paged_cache(pool, table, length)
  hidden, cache = model.apply(
    {"params": params},
    tokens,
    mask=None if mask is None else mask(tokens, count),
    cache=cache,
    lengths=count,
  )
  return hidden[jnp.arange(1), count - 1], paged.pool_from_cache(cache)


def _of_prompts(params: Params, prompts: Int[Array, " R"] | None) -> Params:
  return params if prompts is None else weights.take_rows(params, prompts)


@functools.partial(
  jax.jit, static_argnames=("model",), donate_argnames=("length", "rows")
)
def insert_row(
  model: Transformer,
  params: Params,
  length: Int[Array, " R"],
  rows: Rows,
  row: Int[Array, ""],
  count: Int[Array, ""],
  new: Rows,
  hidden: Float[Array, "1 D"],
  sampling: Sampling,
  stop: Int[Array, "E"],
) -> tuple[Int[Array, " R"], Rows, Int[Array, ""]]:
  """Samples a prefilled row's first token and inserts the row into the batch.

  Args:
    length, rows: tokens of each row in pages, and all rows; donated.
    row: index to insert at.
    count: number of tokens of its prompt.
    new: the new row, R = 1, without a token.
    hidden: hidden state of its prompt's last token.
    stop: tokens that end a row.

  Returns:
    The updated lengths and rows, and the first token.
  """
  drawn, token, _ = decoding.next_token(
    model, params, new, hidden, sampling, stop
  )
  rows = jax.tree.map(lambda old, x: old.at[row].set(x[0]), rows, drawn)
  return length.at[row].set(count), rows, token[0]


@functools.partial(
  jax.jit,
  static_argnames=("model", "size"),
  donate_argnames=("pool", "length", "rows"),
)
def decode(
  model: Transformer,
  params: Params,
  pool: paged.Pool,
  length: Int[Array, " R"],
  rows: Rows,
  table: Int[Array, "R W"],
  sampling: Sampling,
  stop: Int[Array, "E"],
  size: int,
  prompts: Int[Array, " R"] | None = None,
) -> tuple[paged.Pool, Int[Array, " R"], Rows, GeneratedTokens]:
  """Decodes up to `size` tokens as `decoding.decode` does, with pages.

  Args:
    pool, length, rows: current pages, tokens of each row in them, and rows;
      donated.
    table: page table of each row.
    stop: tokens that end a row.
    size: C, number of tokens.
    prompts: the prompt of each row, if weights are per row: a row for each
      prompt. Any for a row that has ended.

  Returns:
    The updated pages, lengths and rows, and the new tokens `[R, C]`.
  """
  state = State(paged.paged_cache(pool, table, length), rows)
  state, drawn = decoding.decode(
    model, _of_prompts(params, prompts), state, sampling, stop, size
  )
  pool = paged.pool_from_cache(state.cache)
  return pool, state.cache.length, state.rows, drawn


copy_page = jax.jit(paged.copy_page, donate_argnames=("pool",))
