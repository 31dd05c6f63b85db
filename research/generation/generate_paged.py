"""Generation over pages: rows that end make room for prompts that wait.

Continuous batching (Yu et al. 2022, "Orca") over paged keys and values (Kwon et
al. 2023, arXiv:2309.06180). Five programs do the work, whatever the lengths:
they read a piece of a prompt, of either size, enter its first token among the
rows, decode a chunk of tokens for all rows, and copy a page in which two
prompts part. Between chunks rows that have ended give their pages back, and the
next prompts take them, in order. What a prompt has in common with a row that is
there is not read again.

A row gets pages for all the tokens that it may come to have when it is let in,
so none is ever turned out. Its tokens are those of `generate`.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import weights
from research.generation import generate, paging
from research.generation import generate_paged_rows as programs
from research.generation import sampling as samplers
from research.generation.generate import CHUNK
from research.generation.generated import NONE, trimmed
from research.generation.page_allocator import PageAllocator
from research.generation.paging import Paging
from research.generation.sampling import GREEDY, Sampling
from research.nn import rope
from research.nn.cache import paged
from research.nn.transformer import Transformer
from research.typing import Params, PRNGKey, UserError

PIECES = (16, 64)
"""Tokens of a prompt that are read at a time: the least that hold the rest."""


def _pieces(
  prompt: Sequence[int], start: int
) -> Iterator[tuple[int, np.ndarray, int]]:
  """Yields where a piece begins, its tokens `[1, size]`, how many are live."""
  while start < len(prompt):
    rest = len(prompt) - start
    size = next((n for n in PIECES if n >= rest), PIECES[-1])
    piece = prompt[start : start + size]
    tokens = np.zeros((1, size), np.int32)
    tokens[0, : len(piece)] = piece
    yield start, tokens, len(piece)
    start += size


class _Batch:
  """Rows and pages on the device, and which prompt each row continues."""

  def __init__(self, model, params, prompts, limits, rules, pages, dtype):
    self.model, self.params, self.pages = model, params, pages
    self.prompts, self.limits = prompts, limits
    self.tokens = paging.extents(prompts, limits)
    self.sampling, self.stop, self.keys = rules
    self.held: dict[int, int] = {}
    self.pool = paged.empty_pool(model, params, pages.count, pages.size, dtype)
    asked = self.sampling.repetition_penalty is not None
    self.rows = programs.nobody(
      len(pages.table), self.keys[0], model.vocab_size if asked else None
    )

  def free_row_for(self, i: int) -> int | None:
    """Returns a row that prompt `i` can have now, or None."""
    rows = (r for r in range(len(self.pages.table)) if r not in self.held)
    row = next(rows, None)
    # A row alone has room, or never will: `admit` then says so.
    room = not self.held or self.pages.has_room(self.prompts[i], self.tokens[i])
    return row if room else None

  def admit(self, row: int, i: int) -> Any:
    """Returns the first token after prompt `i`, which the row reads."""
    prompt = self.prompts[i]
    start = self.pages.admit(row, prompt, self.tokens[i])
    if start.copy is not None:
      self.pool = programs.copy(self.pool, *map(np.int32, start.copy))
    table = self.pages.table[[row]]
    for at, tokens, length in _pieces(prompt, start.read):
      hidden, self.pool = programs.read(
        self.model,
        self.params,
        self.pool,
        table,
        np.int32([at]),
        tokens,
        np.int32([length]),
      )
    seen = None
    if self.rows.seen is not None:
      seen = np.zeros((1, self.model.vocab_size), bool)
      seen[0, list(prompt)] = True
    none, limit = np.int32([0]), np.int32([self.limits[i]])
    length, keys = np.int32([len(prompt)]), self.keys[i : i + 1]
    new = programs.Rows(length, none, none, limit, np.array([True]), keys, seen)
    self.held[row] = i
    self.rows, token = programs.enter(
      self.model,
      self.params,
      self.rows,
      np.int32(row),
      new,
      hidden,
      self.sampling,
      self.stop,
    )
    return token

  def decode(self, size: int, reach: int | None) -> dict[int, list[int]]:
    """Returns new tokens of prompts; rows that end give their pages back.

    Args:
      size: how many, at most.
      reach: how far all layers look back, or None.
    """
    # A copy: the table changes before the device has read it.
    self.pool, self.rows, out = programs.decode(
      self.model,
      self.params,
      self.pool,
      self.rows,
      self.pages.table.copy(),
      self.sampling,
      self.stop,
      size,
    )
    out, done = np.asarray(out), np.asarray(self.rows.done)
    lengths, found = np.asarray(self.rows.length), {}
    for row, i in list(self.held.items()):
      found[i] = [token for token in out[row].tolist() if token != NONE]
      if done[row]:
        self.pages.release(row)
        del self.held[row]
      elif reach is not None:
        self.pages.trim(row, int(lengths[row]) - reach + 1)
    return found


def chunks(
  model: Transformer,
  params: Params,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  sampling: Sampling = GREEDY,
  key: PRNGKey | None = None,
  stop_tokens: Sequence[int] = (),
  examples: Sequence[int] | None = None,
  size: int = CHUNK,
  layout: Paging = Paging(),
  pages: PageAllocator | None = None,
) -> Iterator[np.ndarray]:
  """Yields new tokens `[B, n]` as they come, each row's first, then `NONE`.

  Args:
    model, params, prompts, max_new_tokens, sampling, key, stop_tokens,
      examples, size: as for `generate.chunks`.
    layout: of the pages; how many there are, and rows, is as `pages` has it
      where that is given.
    pages: from `paging.allocator` for this layout, held by nobody, for those
      who want to know what was used.

  Raises:
    UserError: a prompt is empty, too long, or no prompt for this model; there
      are not enough pages for one of them, or somebody holds some; adapters or
      rotations ask for whole rows.
  """
  samplers.check(sampling)
  _check_rotations(model)
  _check_adapters(params)
  limits = generate.limits(model, prompts, max_new_tokens)
  if pages is None:
    pages = paging.allocator(model, prompts, max_new_tokens, layout)
  _check_pages(pages, layout)
  key = jax.random.key(0) if key is None else key
  rows = range(len(prompts)) if examples is None else examples
  keys = samplers.row_keys(key, jnp.array(rows, jnp.int32))
  rules = sampling, generate.stops(stop_tokens), keys
  batch = _Batch(model, params, prompts, limits, rules, pages, layout.dtype)
  windows = [kind.attention.window for kind in model.layer_kinds()]
  reach = None if None in windows else max(windows)
  waiting = collections.deque(range(len(prompts)))
  while waiting or batch.held:
    first = {}
    while waiting and (row := batch.free_row_for(waiting[0])) is not None:
      i = waiting.popleft()
      first[i] = batch.admit(row, i)
    found = batch.decode(size, reach)
    found |= {i: [int(token), *found[i]] for i, token in first.items()}
    out = np.full((len(prompts), 1 + size), NONE, np.int32)
    for i, tokens in found.items():
      out[i, : len(tokens)] = tokens
    yield trimmed(out)


def _check_pages(pages, layout):
  """Raises UserError unless all pages are free, and as the layout says."""
  if pages.size != layout.size:
    raise UserError(
      f"pages: found pages of {pages.size} tokens beside a layout of "
      f"{layout.size}, expected the layout that they were made for"
    )
  if pages.used:
    raise UserError(
      f"pages: found {pages.used} of {pages.count} held, expected all of them "
      "free: what they hold is another call's, which has not ended.\nMake new "
      "ones for each call (paging.allocator)."
    )


def _check_rotations(model):
  """Raises UserError if a token's rotation depends on those behind it."""
  ropes = (kind.attention.rope for kind in model.layer_kinds())
  if any(r and isinstance(r.scaling, rope.Dynamic) for r in ropes):
    raise UserError(
      "pages: found rotations that depend on how long a prompt is "
      "(rope.Dynamic), expected ones that do not: prompts are read in pieces, "
      "and share them.\nGenerate without pages."
    )


def _check_adapters(params):
  """Raises UserError if a weight is of rows, or wants to know their tokens."""
  loose = jax.eval_shape(lambda: weights.bind(params))
  if jax.tree.structure(loose) != jax.tree.structure(params):
    raise UserError(
      "pages: found weights that are bound to the rows of a batch "
      "(weights.bind), expected one adapter for all rows: which row is whose "
      "changes as they end.\nGenerate without pages."
    )
  token = jnp.zeros((1, 1), jnp.int32)
  told = jax.eval_shape(lambda: weights.with_tokens(params, token))
  if jax.tree.structure(told) != jax.tree.structure(params):
    raise UserError(
      "pages: found an adapter that acts behind some tokens alone, expected "
      "one that need not know whole rows.\nGenerate without pages."
    )
