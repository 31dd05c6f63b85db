"""Jitted programs of paged generation: prefill, insertion, decoding, copying.

The state of the rows is data, so between two calls any row may end and be
assigned to another prompt without recompilation.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from research import weights
from research.generation import decoding
from research.generation.boundary import Boundary
from research.generation.decoding import GeneratedTokens, PromptMask, Rows
from research.generation.sampling import Sampling
from research.nn.cache import paged
from research.nn.transformer import Transformer
from research.typing import Array, Float, Int, Params, PRNGKey


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedRows:
  """The rows of a batch, and how many of their tokens are in pages.

  Attributes:
    length: `[R]`, number of tokens in pages: all of a row's but the last.
    rows: everything else; those that are unassigned have ended.
  """

  length: Any
  rows: Rows


def empty_rows(count: int, key: PRNGKey, vocab: int | None = None) -> PagedRows:
  """Returns the state of unassigned rows.

  Args:
    count: R.
    key: any key; a placeholder.
    vocab: V, if `occurred` is needed, else None.
  """
  # Separate arrays: a buffer may be donated only once.
  length, token, step, limit = (jnp.zeros(count, jnp.int32) for _ in range(4))
  rows = Rows(
    token=token,
    step=step,
    limit=limit,
    done=jnp.ones(count, bool),
    keys=jnp.broadcast_to(key, (count,)),
    occurred=None if vocab is None else jnp.zeros((count, vocab), bool),
  )
  return PagedRows(length, rows)


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
  jax.jit, static_argnames=("model",), donate_argnames=("rows",)
)
def insert_row(
  model: Transformer,
  params: Params,
  rows: PagedRows,
  row: Int[Array, ""],
  new: PagedRows,
  hidden: Float[Array, "1 D"],
  sampling: Sampling,
  stop: Int[Array, "E"],
) -> tuple[PagedRows, Int[Array, ""]]:
  """Samples a prefilled row's first token and inserts the row into the batch.

  Args:
    rows: all rows; donated.
    row: index to insert at.
    new: the new row, R = 1, without a token.
    hidden: hidden state of its prompt's last token.
    stop: tokens that end a row.

  Returns:
    The updated rows, and the first token.
  """
  drawn, token, _ = decoding.next_token(
    model, params, new.rows, hidden, sampling, stop
  )
  new = PagedRows(new.length, drawn)
  rows = jax.tree.map(lambda old, x: old.at[row].set(x[0]), rows, new)
  return rows, token[0]


@functools.partial(
  jax.jit,
  static_argnames=("model", "size", "log_probs"),
  donate_argnames=("pool", "rows"),
)
def decode(
  model: Transformer,
  params: Params,
  pool: paged.Pool,
  rows: PagedRows,
  table: Int[Array, "R W"],
  sampling: Sampling,
  stop: Int[Array, "E"],
  size: int,
  boundary: Boundary | None = None,
  log_probs: bool = False,
  prompts: Int[Array, " R"] | None = None,
) -> tuple[paged.Pool, PagedRows, GeneratedTokens]:
  """Decodes up to `size` tokens for all rows; stops early if none is active.

  Rows that have ended or pause write nothing.

  Args:
    pool, rows: current pages and rows; donated.
    table: page table of each row.
    stop: tokens that end a row.
    size: C, number of tokens.
    boundary, log_probs: as for `decoding.prefill`.
    prompts: the prompt of each row, if weights are per row: a row for each
      prompt. Any for a row that has ended.

  Returns:
    The updated pages and rows, and the new tokens `[R, C]`.
  """
  params = _of_prompts(params, prompts)

  def step(carry):
    pool, now = carry
    hidden, cache = model.apply(
      {"params": params},
      now.rows.token[:, None],
      cache=paged.paged_cache(pool, table, now.length),
      lengths=now.rows.active.astype(jnp.int32),
    )
    rows, token, scores = decoding.next_token(
      *(model, params, now.rows, hidden[:, 0], sampling, stop),
      *(boundary, log_probs),
    )
    after = PagedRows(cache.length, rows)
    return (paged.pool_from_cache(cache), after), token, scores

  (pool, rows), drawn = decoding.repeat(
    step, (pool, rows), lambda carry: carry[1].rows, size, log_probs
  )
  return pool, rows, drawn


first_tokens = functools.partial(
  jax.jit, static_argnames=("model", "log_probs")
)(decoding.next_token)
"""Samples the first token of rows whose prompts are in pages."""

copy_page = jax.jit(paged.copy_page, donate_argnames=("pool",))

copy_pages = jax.jit(paged.copy_pages, donate_argnames=("pool",))


@jax.jit
def select_rows(
  rows: PagedRows, chosen: Int[Array, " N"], branch: Int[Array, " N"]
) -> PagedRows:
  """Returns N rows; arguments as for `decoding.select`."""
  return PagedRows(
    rows.length[chosen], decoding.select_rows(rows.rows, chosen, branch)
  )
