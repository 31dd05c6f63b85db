"""Paged generation: continuous batching with a paged key/value cache.

Continuous batching (Yu et al. 2022, "Orca") over paged keys and values (Kwon et
al. 2023, arXiv:2309.06180). Five compiled programs handle all lengths: prefill
of a prompt piece (in two sizes), insertion of a prefilled row, decoding of a
chunk of tokens for all rows, and copying of a page in which two prompts
diverge. Between chunks, rows that have ended release their pages, and waiting
prompts are admitted in order. A prefix shared with an active row is not
prefilled again.

On admission, a row gets pages for the maximum number of its tokens, so no row
is ever preempted. The generated tokens equal those of `generate`.

Prompts with images, whose weights are per row, are prefilled in one piece, so
that placeholders meet their features and an image's tokens see each other; all
have one size. They share no prefix: equal placeholders are other images.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import weights
from research.generation import generate, paging, row_weights
from research.generation import generate_paged_rows as programs
from research.generation import sampling as samplers
from research.generation.decoding import PromptMask, Rows
from research.generation.generate import CHUNK
from research.generation.generated import NO_TOKEN, drop_empty_columns
from research.generation.page_allocator import PageAllocator
from research.generation.paging import Paging
from research.generation.sampling import GREEDY, Sampling
from research.nn import rope
from research.nn.cache import paged
from research.nn.transformer import Transformer
from research.typing import Params, PRNGKey, UserError

PREFILL_SIZES = (16, 64)
"""Sizes of prefill pieces in tokens; uses the smallest that fits the rest."""


def pieces(
  prompt: Sequence[int], start: int
) -> Iterator[tuple[int, np.ndarray, int]]:
  """Yields `(start, padded tokens [1, size], number of tokens)` per piece."""
  while start < len(prompt):
    rest = len(prompt) - start
    size = next((n for n in PREFILL_SIZES if n >= rest), PREFILL_SIZES[-1])
    piece = prompt[start : start + size]
    tokens = np.zeros((1, size), np.int32)
    tokens[0, : len(piece)] = piece
    yield start, tokens, len(piece)
    start += size


class _Batch:
  """Rows and pages on the device, and the prompt assigned to each row."""

  def __init__(self, model, params, prompts, limits, rules, pages, dtype, mask):
    self.model, self.pages, self.mask = model, pages, mask
    self.prompts, self.limits = prompts, limits
    self.per_row = row_weights.per_row(params)
    self.params, self.whole = params, None
    if self.per_row or mask is not None:
      self.whole, lengths = generate.pad_prompts(prompts)
      self.params = generate.bind_prompts(params, self.whole, lengths)
    # The prompt of each row, for weights that are per row.
    self.prompt_of = np.zeros(len(pages.table), np.int32)
    self.tokens = paging.extents(prompts, limits)
    self.sampling, self.stop, self.keys = rules
    self.active: dict[int, int] = {}
    self.pool = paged.empty_pool(model, params, pages.count, pages.size, dtype)
    asked = self.sampling.repetition_penalty is not None
    # Tokens of each row in pages: all of a row's but the last.
    self.length = jnp.zeros(len(pages.table), jnp.int32)
    self.rows = programs.empty_rows(
      len(pages.table), self.keys[0], model.vocab_size if asked else None
    )

  def free_row_for(self, i: int) -> int | None:
    """Returns a row to which prompt `i` can be admitted now, or None."""
    rows = (r for r in range(len(self.pages.table)) if r not in self.active)
    row = next(rows, None)
    # If no row is active, waiting would not help: `admit` raises if pages lack.
    room = not self.active or self.pages.has_room(
      self._prefix(i), self.tokens[i]
    )
    return row if room else None

  def _prefix(self, i: int) -> Sequence[int]:
    """Returns what identifies a prompt's pages: more than tokens, of images."""
    if self.whole is None:
      return self.prompts[i]
    # No token is negative; pages are known by those before them.
    return [-1 - i, *self.prompts[i][1:]]

  def _pieces(
    self, i: int, start: int
  ) -> Iterator[tuple[int, np.ndarray, int]]:
    """Yields the pieces in which a prompt is prefilled; see `pieces`."""
    prompt = self.prompts[i]
    if self.whole is None:
      yield from pieces(prompt, start)
    else:
      yield 0, self.whole[[i]], len(prompt)

  def admit(self, row: int, i: int) -> Any:
    """Prefills prompt `i` into a row; returns its first generated token."""
    prompt = self.prompts[i]
    start = self.pages.admit(row, self._prefix(i), self.tokens[i])
    if start.copy is not None:
      self.pool = programs.copy_page(self.pool, *map(np.int32, start.copy))
    table, number = self.pages.table[[row]], np.int32([i])
    for at, tokens, length in self._pieces(i, start.read):
      hidden, self.pool = programs.prefill(
        self.model,
        self.params,
        self.pool,
        table,
        np.int32([at]),
        tokens,
        np.int32([length]),
        number if self.per_row else None,
        self.mask,
      )
    occurred = None
    if self.rows.occurred is not None:
      # A placeholder may lie outside of the vocabulary.
      occurred = np.isin(np.arange(self.model.vocab_size), prompt)[None]
    none = np.int32([0])
    new = Rows(
      token=none,
      step=none,
      limit=np.int32([self.limits[i]]),
      done=np.array([False]),
      keys=self.keys[i : i + 1],
      occurred=occurred,
    )
    self.active[row] = self.prompt_of[row] = i
    self.length, self.rows, token = programs.insert_row(
      self.model,
      self.params,
      self.length,
      self.rows,
      np.int32(row),
      np.int32(len(prompt)),
      new,
      hidden,
      self.sampling,
      self.stop,
    )
    return token

  def decode(self, size: int, reach: int | None) -> dict[int, list[int]]:
    """Decodes a chunk; returns new tokens by prompt; releases ended rows.

    Args:
      size: maximum number of tokens.
      reach: largest attention window of all layers, or None if unlimited.
    """
    # A copy: the table changes before the device has read it.
    self.pool, self.length, self.rows, drawn = programs.decode(
      self.model,
      self.params,
      self.pool,
      self.length,
      self.rows,
      self.pages.table.copy(),
      self.sampling,
      self.stop,
      size,
      prompts=self.prompt_of.copy() if self.per_row else None,
    )
    out, done = np.asarray(drawn.tokens), np.asarray(drawn.done)
    lengths, new_tokens = np.asarray(self.length), {}
    for row, i in list(self.active.items()):
      new_tokens[i] = [
        token for token in out[row].tolist() if token != NO_TOKEN
      ]
      if done[row]:
        self.pages.release(row)
        del self.active[row]
      elif reach is not None:
        self.pages.trim(row, int(lengths[row]) - reach + 1)
    return new_tokens


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
  mask: PromptMask | None = None,
) -> Iterator[np.ndarray]:
  """Yields chunks of new tokens `[B, n]`, each row padded with `NO_TOKEN`.

  Args:
    model, params, prompts, max_new_tokens, sampling, key, stop_tokens,
      examples, size: as for `generate.chunks`.
    layout: page configuration. If `pages` is given, that determines the number
      of pages and rows.
    pages: an allocator with all pages free, from `paging.allocator` for this
      layout; pass one to inspect the page usage afterwards.
    mask: as for `generate.chunks`; by index, such as `vlm.masks.by_index`.

  Raises:
    UserError: a prompt is empty, too long, or has ids outside the vocabulary;
      there are too few pages for a prompt, or some are in use; the model has
      dynamic rotary scaling or adapters that depend on the row or its tokens;
      there are images of another number of prompts.
  """
  samplers.check(sampling)
  check_rotations(model)
  _check_rows(params, len(prompts))
  extra = weights.extra_ids(params)
  limits = generate.token_limits(model, prompts, max_new_tokens, extra)
  if pages is None:
    pages = paging.allocator(model, prompts, max_new_tokens, layout, extra)
  _check_pages(pages, layout)
  key = jax.random.key(0) if key is None else key
  rows = range(len(prompts)) if examples is None else examples
  keys = samplers.row_keys(key, jnp.array(rows, jnp.int32))
  rules = sampling, generate.pad_stop_tokens(stop_tokens), keys
  batch = _Batch(
    model, params, prompts, limits, rules, pages, layout.dtype, mask
  )
  windows = [kind.attention.window for kind in model.layer_kinds()]
  reach = None if None in windows else max(windows)
  waiting = collections.deque(range(len(prompts)))
  while waiting or batch.active:
    first = {}
    while waiting and (row := batch.free_row_for(waiting[0])) is not None:
      i = waiting.popleft()
      first[i] = batch.admit(row, i)
    new_tokens = batch.decode(size, reach)
    new_tokens |= {
      i: [int(token), *new_tokens[i]] for i, token in first.items()
    }
    out = np.full((len(prompts), 1 + size), NO_TOKEN, np.int32)
    for i, tokens in new_tokens.items():
      out[i, : len(tokens)] = tokens
    yield drop_empty_columns(out)


def _check_pages(pages, layout):
  """Raises UserError unless all pages are free and match the layout."""
  if pages.size != layout.size:
    raise UserError(
      f"pages: found pages of {pages.size} tokens and a layout of "
      f"{layout.size}, expected the layout that they were made for"
    )
  if pages.used:
    raise UserError(
      f"pages: {pages.used} of {pages.count} are in use by another call that "
      "has not ended.\nCreate a new allocator for each call "
      "(paging.allocator)."
    )


def check_rotations(model):
  """Raises UserError if a token's rotation depends on the row's length."""
  ropes = (kind.attention.rope for kind in model.layer_kinds())
  if any(r and isinstance(r.scaling, rope.Dynamic) for r in ropes):
    raise UserError(
      "pages: found rotations that depend on how long a prompt is "
      "(rope.Dynamic), expected ones that do not: prompts are prefilled in "
      "pieces and share pages.\nGenerate without pages."
    )


def _check_rows(params, count):
  """Raises UserError if a weight depends on the row or on its tokens.

  Images do; they have to be those of `count` prompts.
  """
  counts = row_weights.row_counts(params)
  if counts - {count}:
    raise UserError(
      f"pages: found images of {max(counts - {count})} prompts, expected those "
      f"of {count}"
    )
  params = row_weights.without_rows(params)
  if row_weights.bound_to_rows(params):
    raise UserError(
      "pages: found weights that are bound to the rows of a batch "
      "(weights.bind), expected one adapter for all rows: the prompt of a row "
      "changes during generation.\nGenerate without pages."
    )
  if row_weights.bound_to_tokens(params):
    raise UserError(
      "pages: found an adapter that certain tokens activate (aLoRA), which "
      "paged generation does not support.\nGenerate without pages."
    )
