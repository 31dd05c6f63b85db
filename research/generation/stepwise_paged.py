"""Generation step by step over pages: branches share what they have in common.

Like `research.generation.stepwise`. A branch shares the full pages of the row
from which it goes on and copies at most one, so it costs the memory of its own
tokens alone, and nothing is read twice.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.generation import decoding, generate_paged
from research.generation import generate_paged_rows as programs
from research.generation import sampling as samplers
from research.generation.decoding import GeneratedTokens, Rows
from research.generation.generate_paged_rows import PagedRows
from research.generation.page_allocator import PageAllocator
from research.generation.paging import Paging
from research.generation.stepwise import Stepwise, check_choice, ended, joined
from research.nn.cache import paged
from research.typing import Array, Bool, PRNGKey, UserError


@dataclasses.dataclass(frozen=True)
class PagedState:
  """The state between steps.

  Attributes:
    pool: all pages, on the device.
    rows: the rows.
    pages: which pages each row has; changed in place.
    extent: maximum number of tokens of each row, including its prompt.
  """

  pool: paged.Pool
  rows: PagedRows
  pages: PageAllocator
  extent: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedStepwise(Stepwise):
  """`Stepwise` whose keys and values are in pages.

  Attributes:
    layout: page configuration; its `rows` are those of `start`.
    max_rows: maximum number of rows at a time.
  """

  layout: Paging = Paging()
  max_rows: int = 64

  def __post_init__(self):
    super().__post_init__()
    if self.kv is not None:
      raise UserError(
        f"PagedStepwise.kv: found {self.kv!r:.60}, expected none: pages have"
        " their own precision.\nSet Paging.dtype, or use Stepwise."
      )
    if self.reader is not None:
      raise UserError(
        "PagedStepwise.reader: found one, expected none: pages read prompts of"
        " tokens alone.\nUse Stepwise for prompts with images."
      )
    generate_paged.check_rotations(self.model)

  def start(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    key: PRNGKey | None = None,
    copies: int = 1,
  ) -> tuple[PagedState, GeneratedTokens]:
    """Returns rows up to their first pause; see `Stepwise.start`."""
    limits = self._limits(prompts, max_new_tokens, copies)
    extents = [len(p) + n for p, n in zip(prompts, limits, strict=True)]
    total, size = len(prompts) * copies, self.layout.size
    width = -(-max(extents) // size)
    # One page more for each row: while rows are chosen, both have their last.
    count = self.layout.count or (width + 1) * max(total, self.max_rows)
    pages = PageAllocator(count, size, max(total, self.max_rows), width)
    dtype = self.layout.dtype
    pool = paged.empty_pool(self.model, self.params, count, size, dtype)
    hidden, copied = [], []
    for i, prompt in enumerate(prompts):
      row = i * copies
      pool, last = self._read(pages, pool, row, prompt, extents[i])
      hidden += [last] * copies
      prefix = pages.hold(row, len(prompt))
      for other in range(row + 1, row + copies):
        copied.append(pages.attach(other, prefix, extents[i]))
      pages.drop(prefix)
    pool = self._copied(pool, copied)
    seed = jax.random.key(0) if key is None else key
    none = np.zeros(total, np.int32)
    rows = Rows(
      token=none,
      step=none,
      limit=np.repeat(np.array(limits, np.int32), copies),
      done=np.zeros(total, bool),
      keys=samplers.row_keys(seed, jnp.arange(total)),
      occurred=self._occurred(prompts, copies),
      steps=None if self.boundary is None else self.boundary.start(total),
    )
    rows, token, scores = programs.first_tokens(
      self.model,
      self.params,
      jax.tree.map(jnp.asarray, rows),
      jnp.concatenate(hidden),
      self.sampling,
      self._stop,
      self.boundary,
      self.log_probs,
    )
    length = np.repeat(np.array([len(p) for p in prompts], np.int32), copies)
    state = PagedState(
      pool,
      PagedRows(jnp.asarray(length), rows),
      pages,
      tuple(np.repeat(extents, copies).tolist()),
    )
    scores = None if scores is None else scores[:, None]
    return self._until_paused(
      state, [GeneratedTokens(token[:, None], rows.done, scores)]
    )

  def begin(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    key: PRNGKey | None = None,
    copies: int = 1,
  ) -> Any:
    """Raises UserError: a token would be written into a shared page again."""
    raise UserError(
      "PagedStepwise: cannot begin rows before their first token, as step"
      " revision and adaptive allocation do; use Stepwise"
    )

  def advance(self, state: PagedState) -> tuple[PagedState, GeneratedTokens]:
    """Lets paused rows go on; see `Stepwise.advance`."""
    if self.boundary is not None:
      rows = decoding.resume(state.rows.rows)
      rows = dataclasses.replace(state.rows, rows=rows)
      state = dataclasses.replace(state, rows=rows)
    return self._until_paused(state, [])

  def select(
    self, state: PagedState, rows: Sequence[int], branch: Sequence[int]
  ) -> PagedState:
    """Returns the state of chosen rows; see `decoding.select`.

    The pages of `state` are changed in place.

    Raises:
      UserError: there is no such row, two would draw the same tokens, or there
        are too few pages.
    """
    count = state.rows.length.shape[0]
    check_choice(count, rows, branch)
    pages, lengths = state.pages, np.asarray(state.rows.length).tolist()
    prefixes = [pages.hold(row, lengths[row]) for row in rows]
    for row in range(count):
      pages.release(row)
    extent = tuple(state.extent[row] for row in rows)
    copied = [
      pages.attach(i, prefix, most)
      for i, (prefix, most) in enumerate(zip(prefixes, extent, strict=True))
    ]
    pool = self._copied(state.pool, copied)
    for prefix in prefixes:
      pages.drop(prefix)
    chosen = np.array(rows, np.int32)
    new = programs.select_rows(state.rows, chosen, np.array(branch, np.int32))
    return PagedState(pool, new, pages, extent)

  def store(self, state: Any, new: Any, rows: Sequence[int]) -> Any:
    """Raises UserError: rows of two states have pages in two pools."""
    raise UserError(
      "PagedStepwise: cannot store rows of one state in another, as a tree"
      " search does; use Stepwise"
    )

  def done(self, state: PagedState) -> Bool[Array, "B"]:
    """Returns which rows have ended."""
    return state.rows.rows.done

  def append(
    self,
    state: Any,
    tokens: Sequence[Sequence[int]],
    replace: Sequence[bool] | None = None,
  ) -> Any:
    """Raises UserError: nothing is written in pages but what was drawn."""
    raise UserError(
      "PagedStepwise: cannot append tokens that were not drawn; use Stepwise"
    )

  def end(self, state: PagedState, rows: Bool[np.ndarray, "B"]) -> PagedState:
    """Returns the state in which some rows have ended."""
    one = dataclasses.replace(state.rows, rows=ended(state.rows.rows, rows))
    return dataclasses.replace(state, rows=one)

  def _read(self, pages, pool, row, prompt, extent):
    """Returns the pool with a prompt, and the last token's hidden state."""
    begin = pages.admit(row, prompt, extent)
    if begin.copy is not None:
      pool = programs.copy_page(pool, *map(np.int32, begin.copy))
    table = pages.table[[row]].copy()
    hidden = None
    for at, tokens, length in generate_paged.pieces(prompt, begin.read):
      hidden, pool = programs.prefill(
        *(self.model, self.params, pool, table, np.int32([at]), tokens),
        np.int32([length]),
      )
    return pool, hidden

  def _copied(self, pool, pairs) -> paged.Pool:
    """Returns the pool with pages copied; always as many, in one program."""
    pairs = [pair for pair in pairs if pair is not None]
    if not pairs:
      return pool
    nowhere = np.iinfo(np.int32).max
    pairs += [(0, nowhere)] * (self.max_rows - len(pairs))
    sources, targets = np.array(pairs, np.int32).T
    return programs.copy_pages(pool, sources, targets)

  def _occurred(self, prompts, copies) -> Any:
    if self.sampling.repetition_penalty is None:
      return None
    out = np.zeros((len(prompts), self.model.vocab_size), bool)
    for row, prompt in zip(out, prompts, strict=True):
      row[list(prompt)] = True
    return np.repeat(out, copies, axis=0)

  def _until_paused(self, state, parts):
    while bool(state.rows.rows.active.any()):
      table = state.pages.table[: state.rows.length.shape[0]].copy()
      pool, rows, drawn = programs.decode(
        self.model,
        self.params,
        state.pool,
        state.rows,
        table,
        self.sampling,
        self._stop,
        self.size,
        self.boundary,
        self.log_probs,
      )
      state = dataclasses.replace(state, pool=pool, rows=rows)
      parts.append(drawn)
    return state, joined(parts, state.rows.rows.done)
