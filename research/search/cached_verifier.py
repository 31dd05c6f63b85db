"""A verifier that reads each new token once: a Transformer with a cache.

Its rows follow the policy's: prompts are read once for all of their paths, and
where a path is copied its cache is, too. Of a step it reads what training does,
`prm.conventions.step_tokens` of the step's text, and scores the last token.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.generation import generate
from research.generation.decoding import PromptMask
from research.generation.generated import NO_TOKEN
from research.generation.stepwise import PromptReader
from research.nn.cache import Cache, put_rows, take_rows
from research.nn.flops import Causal, ModelCost, model_cost
from research.nn.transformer import Transformer, init_cache
from research.prm.conventions import step_tokens
from research.search.engine import Path
from research.search.ledger import Ledger
from research.typing import Array, Float, Int, Params, UserError
from research.vlm.masks import prompt_context

Head = Callable[[Params, Float[Array, "B D"]], Float[Array, "B"]]
"""(parameters, hidden states of steps' last tokens) -> scores, 0 to 1. Each
object compiles its own program, unless it compares equal."""


class Reading(NamedTuple):
  """How far a row is read: `[R]`, or numbers of one row.

  Attributes:
    tokens: number of tokens in the cache.
    characters: number of the path's text.
    step_tokens, step_characters: the same before the newest step, which is read
      again with text that joins it.
  """

  tokens: Any
  characters: Any
  step_tokens: Any
  step_characters: Any


@dataclasses.dataclass(frozen=True, eq=False)
class VerifierRows:
  """What a `CachedVerifier` knows of its rows.

  Attributes:
    cache: keys and values of all that it has read, R rows.
    reading: how far that is.
    scores: score of the newest step of each row, `[R]`; 0 before the first one.
    spent: cost of the last `read`, of each row.
  """

  cache: Cache
  reading: Reading
  scores: Float[np.ndarray, " R"]
  spent: tuple[Ledger, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CachedVerifier:
  """A process reward model over the policy's steps; a `WritingVerifier`.

  Attributes:
    model: the Transformer, which shares the policy's vocabulary.
    params: its parameters.
    head: makes scores of hidden states.
    outputs: numbers that the head computes for a token; for the ledger.
    tokenizer: encodes the texts of steps, as in the rows of training; None:
      the policy's own tokens are read.
    separator: text that the model reads after a step, as for `step_tokens`.
    prompt_room: tokens that prompts are padded for at least, as the policy's.
    reader: gives the parameters that read prompts; None: `params` do.
  """

  model: Transformer
  params: Params
  head: Head
  outputs: int = 1
  tokenizer: Any = None
  separator: str = ""
  prompt_room: int = 1
  reader: PromptReader | None = None

  def __post_init__(self):
    if self.separator and self.tokenizer is None:
      raise UserError(
        f"CachedVerifier.separator: found {self.separator!r} without a"
        " tokenizer, expected the one that the model was trained with"
      )

  @functools.cached_property
  def _cost(self) -> ModelCost:
    return model_cost(self.model, self.outputs, self.params)

  def prompt_cost(self, tokens: int) -> Ledger:
    """Returns the cost of a prompt, of which nothing is scored."""
    reader = self.reader
    context = prompt_context(None if reader is None else reader.mask, tokens)
    flops = self._cost.forward(tokens, context, 0)
    return Ledger(
      verifier_prefill_tokens=tokens,
      flops_verifier=flops + (0 if reader is None else reader.flops),
    )

  def step_cost(self, start: int, tokens: int) -> Ledger:
    """Returns the cost of reading some tokens, and of one score."""
    return Ledger(
      verifier_new_tokens=tokens,
      flops_verifier=self._cost.forward(tokens, Causal(start, tokens), 1),
    )

  def spent(self, state: VerifierRows) -> Sequence[Ledger]:
    return state.spent

  def start(
    self, prompts: Sequence[Sequence[int]], copies: int, max_new_tokens: int
  ) -> VerifierRows:
    longest = max(map(len, prompts))
    most = self.model.max_positions
    if most is not None and longest + max_new_tokens > most:
      raise UserError(
        f"verifier: found prompts of up to {longest} tokens and"
        f" {max_new_tokens} new ones, expected at most {most} together, its"
        " context"
      )
    tokens, lengths = generate.pad_prompts(prompts, self.prompt_room)
    room = max(longest, self.prompt_room) + max_new_tokens
    reader = self.reader
    cache = _start(
      self.model,
      self.params if reader is None else reader(prompts),
      tokens,
      lengths,
      capacity=generate.bucket(room),
      copies=copies,
      mask=None if reader is None else reader.mask,
    )
    rows = len(prompts) * copies
    tokens = np.repeat(np.array([len(x) for x in prompts]), copies)
    none = np.zeros(rows, int)
    return VerifierRows(
      cache=cache,
      reading=Reading(tokens, none, tokens, none),
      scores=np.zeros(rows, np.float32),
      spent=(Ledger(),) * rows,
    )

  def read(
    self,
    state: VerifierRows,
    paths: Sequence[Path],
    new: Int[np.ndarray, "R C"],
  ) -> tuple[VerifierRows, Float[np.ndarray, " R"]]:
    """Returns the state after new tokens, and the scores; see `Verifier`.

    A step without text joins the one before it, which is read and scored again.

    Raises:
      UserError: a text is longer than the model's context.
    """
    rows = [
      self._unread(path, row[row != NO_TOKEN].tolist(), Reading(*before))
      for path, row, *before in zip(paths, new, *state.reading, strict=True)
    ]
    tokens, counts = generate.pad_prompts([ids for ids, _ in rows])
    reading = Reading(*map(np.array, zip(*(x for _, x in rows), strict=True)))
    starts, longest = reading.tokens - counts, int(reading.tokens.max())
    most = self.model.max_positions
    if most is not None and longest > most:
      raise UserError(
        f"verifier: found {longest} tokens of a prompt and its steps, with"
        f" separators, expected at most {most}, its context"
      )
    cache, scores = _read(
      self.model,
      self.params,
      self._with_room(state.cache, longest),
      starts,
      tokens,
      counts,
      self.head,
    )
    scores = np.where(counts > 0, np.asarray(scores), state.scores)
    spent = tuple(
      self.step_cost(int(start), int(count)) if count else Ledger()
      for start, count in zip(starts, counts, strict=True)
    )
    return VerifierRows(cache, reading, scores, spent), scores

  def _unread(
    self, path: Path, new: Sequence[int], before: Reading
  ) -> tuple[Sequence[int], Reading]:
    """Returns the tokens to read of a path, and how far it is read with them.

    Args:
      path: new tokens included.
      new: tokens since it was read.
      before: how far it was read.
    """
    if not new:
      return [], before
    if self.tokenizer is None:
      return new, Reading(before.tokens + len(new), 0, before.tokens, 0)
    text = path.text(self.tokenizer.decode)
    start, begin = before.tokens, before.characters
    if not text.strip():
      return [], before
    if not text[begin:].strip():
      start, begin = before.step_tokens, before.step_characters
    ids = step_tokens(self.tokenizer, text[begin:], self.separator)
    return ids, Reading(start + len(ids), len(text), start, begin)

  def _with_room(self, cache: Cache, tokens: int) -> Cache:
    """Returns the cache with room for a row of so many tokens."""
    if tokens <= cache.capacity:
      return cache
    return _grown(self.model, self.params, cache, generate.bucket(tokens))

  def select(self, state: VerifierRows, rows: Sequence[int]) -> VerifierRows:
    at = np.array(rows, np.int32)
    return VerifierRows(
      cache=_select(state.cache, at),
      reading=Reading(*(x[at] for x in state.reading)),
      scores=state.scores[at],
      spent=tuple(state.spent[row] for row in rows),
    )

  def store(
    self, state: VerifierRows, new: VerifierRows, rows: Sequence[int]
  ) -> VerifierRows:
    at, count = np.array(rows, np.int32), len(state.scores)
    inside = at < count
    # One of them may have read further than there was room for at first.
    capacity = max(state.cache.capacity, new.cache.capacity)
    old, fresh = (self._with_room(x.cache, capacity) for x in (state, new))

    def put(old: np.ndarray, new: np.ndarray) -> np.ndarray:
      old = old.copy()
      old[at[inside]] = new[inside]
      return old

    return VerifierRows(
      cache=_store(old, fresh, at),
      reading=Reading(*map(put, state.reading, new.reading)),
      scores=put(state.scores, new.scores),
      spent=(Ledger(),) * count,
    )


@functools.partial(
  jax.jit, static_argnames=("model", "capacity", "copies", "mask")
)
def _start(
  model: Transformer,
  params: Params,
  tokens: Int[Array, "B T"],
  lengths: Int[Array, "B"],
  capacity: int,
  copies: int,
  mask: PromptMask | None = None,
) -> Cache:
  count = tokens.shape[0]
  cache = init_cache(model, params, count, capacity, rings=False)
  _, cache = model.apply(
    {"params": params},
    tokens,
    mask=None if mask is None else mask(tokens, lengths),
    cache=cache,
    lengths=lengths,
    keep=lengths[:, None] - 1,
  )
  return take_rows(cache, jnp.repeat(jnp.arange(count), copies))


@functools.partial(
  jax.jit, static_argnames=("model", "head"), donate_argnames=("cache",)
)
def _read(
  model: Transformer,
  params: Params,
  cache: Cache,
  starts: Int[Array, " R"],
  tokens: Int[Array, "R C"],
  counts: Int[Array, " R"],
  head: Head,
) -> tuple[Cache, Float[Array, " R"]]:
  cache = dataclasses.replace(cache, length=starts)
  last = jnp.maximum(counts - 1, 0)[:, None]
  hidden, cache = model.apply(
    {"params": params}, tokens, cache=cache, lengths=counts, keep=last
  )
  return cache, head(params, hidden[:, -1])


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def _grown(
  model: Transformer, params: Params, cache: Cache, capacity: int
) -> Cache:
  """Returns a cache of more slots, each position in the slot of before."""
  rows = cache.length.shape[0]
  empty = init_cache(model, params, rows, capacity, rings=False)
  layers = jax.tree.map(
    lambda x, old: x.at[tuple(map(slice, old.shape))].set(old),
    empty.layers,
    cache.layers,
  )
  return Cache(cache.length, layers, cache.fresh)


_select = jax.jit(take_rows)

_store = jax.jit(put_rows, donate_argnames=("cache",))
