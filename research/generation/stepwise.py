"""Generation step by step: rows pause, are judged and chosen, and go on.

For searches over steps of reasoning. A prompt is processed once, however many
rows continue it, and no row reads its own text again.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from research import weights
from research.generation import decoding, generate, row_weights
from research.generation import sampling as samplers
from research.generation.boundary import Boundary
from research.generation.decoding import (
  GeneratedTokens,
  PromptMask,
  Rows,
  State,
)
from research.generation.generated import NO_TOKEN
from research.generation.sampling import GREEDY, Sampling
from research.nn.transformer import Transformer
from research.typing import Array, Bool, Params, PRNGKey, UserError


@runtime_checkable
class PromptReader(Protocol):
  """Reads prompts that are more than tokens, such as those with images.

  Attributes:
    flops: FLOPs of what is read beside the tokens of one prompt, for ledgers.
    mask: what the tokens of a prompt see of each other; None for causal.
  """

  @property
  def flops(self) -> float | int: ...

  @property
  def mask(self) -> PromptMask | None: ...

  def __call__(self, prompts: Sequence[Sequence[int]]) -> Params:
    """Returns parameters whose row i reads prompt i, and no token after it."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stepwise:
  """A model, and how its rows are sampled.

  Attributes:
    model: the Transformer.
    params: its parameters, preferably from `generate.prepare`.
    sampling: sampling parameters.
    stop_tokens: end a row, and are its last token.
    boundary: where rows pause; None: only at their end.
    kv: quantizer of the cache, as for `init_cache`.
    log_probs: whether tokens come with their log-probabilities.
    size: tokens of a decoding program.
    prompt_room: tokens that prompts are padded for at least, so that batches
      whose longest prompts differ share their programs.
    reader: gives the parameters that read prompts; None: `params` do.
  """

  model: Transformer
  params: Params
  sampling: Sampling = GREEDY
  stop_tokens: Sequence[int] = ()
  boundary: Boundary | None = None
  kv: Any = None
  log_probs: bool = False
  size: int = generate.CHUNK
  prompt_room: int = 1
  reader: PromptReader | None = None

  def __post_init__(self):
    samplers.check(self.sampling)
    if (
      row_weights.per_row(self.params)
      or row_weights.bound_to_rows(self.params)
      or row_weights.bound_to_tokens(self.params)
    ):
      raise UserError(
        "Stepwise: found weights that depend on the tokens of a row, such as"
        " images or an adapter that certain tokens activate; expected ones that"
        " do not, since rows are copied and dropped.\nImages of prompts are a"
        " reader's: vlm.prompts.ImageReader"
      )

  def start(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    key: PRNGKey | None = None,
    copies: int = 1,
  ) -> tuple[State, GeneratedTokens]:
    """Returns `copies` rows for each prompt, up to their first pause.

    Args:
      prompts: P of them, token ids.
      max_new_tokens: maximum per row.
      key: random key of the sampling; seed 0 by default.
      copies: rows that continue each prompt, one after the other.

    Returns:
      The state of `P * copies` rows, and their tokens.

    Raises:
      UserError: a prompt is empty, too long, or has ids outside the vocabulary;
        or `copies` is below 1.
    """
    state, drawn = self._prefill(prompts, max_new_tokens, key, copies)
    return self._until_paused(state, [drawn])

  def begin(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    key: PRNGKey | None = None,
    copies: int = 1,
  ) -> State:
    """Returns the rows of `start` before their first token.

    `advance` draws it, and feeds each row's last token of the prompt again; all
    others are in the cache. Arguments as for `start`.

    Raises:
      UserError: as for `start`; or the last token of a prompt cannot be fed
        again: the cache is quantized, or an image stands there.
    """
    extra = weights.extra_ids(self.params)
    ends = [prompt[-1] for prompt in prompts if len(prompt)]
    if self.kv is not None or any(end in extra for end in ends):
      raise UserError(
        "Stepwise.begin: found a quantized cache, or a prompt that ends in an"
        " image, expected neither: its last token is fed again"
      )
    state, _ = self._prefill(prompts, max_new_tokens, key, copies)
    rows, bound = state.rows, self.boundary
    rows = dataclasses.replace(
      rows,
      token=jnp.repeat(jnp.array(ends, jnp.int32), copies),
      step=jnp.zeros_like(rows.step),
      done=jnp.zeros_like(rows.done),
      steps=None if bound is None else bound.start(len(rows.step)),
    )
    cache = dataclasses.replace(state.cache, length=state.cache.length - 1)
    return State(cache, rows)

  def _prefill(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    key: PRNGKey | None,
    copies: int,
  ) -> tuple[State, GeneratedTokens]:
    """Returns the rows after their first token; arguments as for `start`."""
    limits = self._limits(prompts, max_new_tokens, copies)
    tokens, lengths = generate.pad_prompts(prompts, self.prompt_room)
    longest = max(len(p) + n for p, n in zip(prompts, limits, strict=True))
    longest = max(longest, self.prompt_room + max(limits))
    reader = self.reader
    return decoding.prefill(
      self.model,
      self.params if reader is None else reader(prompts),
      tokens,
      lengths,
      self.sampling,
      jax.random.key(0) if key is None else key,
      np.arange(len(prompts) * copies, dtype=np.int32),
      np.repeat(np.array(limits, np.int32), copies),
      self._stop,
      capacity=generate.bucket(longest),
      kv=self.kv,
      mask=None if reader is None else reader.mask,
      boundary=self.boundary,
      log_probs=self.log_probs,
    )

  def advance(self, state: State) -> tuple[State, GeneratedTokens]:
    """Lets paused rows go on; returns them up to the next pause, or the end.

    Args:
      state: state of any rows; its buffers are donated.

    Returns:
      The state, and the new tokens `[B, C]`, of which each row has those of one
      step, and `NO_TOKEN` in other places.
    """
    if self.boundary is not None:
      state = dataclasses.replace(state, rows=decoding.resume(state.rows))
    return self._until_paused(state, [])

  def select(
    self, state: State, rows: Sequence[int], branch: Sequence[int]
  ) -> State:
    """Returns the state of chosen rows; see `decoding.select`.

    Raises:
      UserError: there is no such row, or two would draw the same tokens.
    """
    check_choice(state.rows.token.shape[0], rows, branch)
    return decoding.select(
      state, np.array(rows, np.int32), np.array(branch, np.int32)
    )

  def append(
    self,
    state: State,
    tokens: Sequence[Sequence[int]],
    replace: Sequence[bool] | None = None,
  ) -> State:
    """Returns the state after tokens that were not drawn; `decoding.append`.

    Args:
      state: any state; its buffers are donated.
      tokens: token ids for each row, or none.
      replace: which rows lose their last token first; by default no row.

    Raises:
      UserError: a row would have more tokens than its limit.
    """
    count = np.array([len(row) for row in tokens])
    lost = np.array(replace or [False] * len(tokens)) & (count > 0)
    over = np.asarray(state.rows.step) + count - lost > state.rows.limit
    if over.any():
      row = int(np.argmax(over))
      raise UserError(
        f"append: found {count[row]} tokens after {int(state.rows.step[row])}"
        f" of row {row}, expected at most {int(state.rows.limit[row])} together"
      )
    padded = np.full((len(tokens), max(count.max(), 1)), NO_TOKEN, np.int32)
    for row, added in zip(padded, tokens, strict=True):
      row[: len(added)] = added
    return decoding.append(self.model, self.params, state, padded, lost)

  def store(self, state: State, new: State, rows: Sequence[int]) -> State:
    """Returns the state with other rows in place of some; `decoding.store`."""
    return decoding.store(state, new, np.array(rows, np.int32))

  def done(self, state: State) -> Bool[Array, "B"]:
    return state.rows.done

  def end(self, state: State, rows: Bool[np.ndarray, "B"]) -> State:
    return dataclasses.replace(state, rows=ended(state.rows, rows))

  def _limits(
    self, prompts: Sequence[Sequence[int]], max_new_tokens: int, copies: int
  ) -> list[int]:
    """Returns the maximum number of new tokens of each prompt, checked."""
    if copies < 1:
      raise UserError(f"copies: found {copies}, expected at least 1")
    extra = weights.extra_ids(self.params)
    return generate.token_limits(self.model, prompts, max_new_tokens, extra)

  @property
  def _stop(self) -> np.ndarray:
    return generate.pad_stop_tokens(self.stop_tokens)

  def _until_paused(self, state, parts) -> tuple[State, GeneratedTokens]:
    while bool(jnp.any(state.rows.active)):
      state, drawn = decoding.decode(
        self.model,
        self.params,
        state,
        self.sampling,
        self._stop,
        self.size,
        self.boundary,
        self.log_probs,
      )
      parts.append(drawn)
    return state, joined(parts, state.rows.done)


def ended(rows: Rows, which: Bool[np.ndarray, "B"]) -> Rows:
  """Returns rows, some of which get no more tokens."""
  return dataclasses.replace(rows, done=rows.done | which)


def check_choice(
  count: int, rows: Sequence[int], branch: Sequence[int]
) -> None:
  """Raises UserError if `rows` of `count` cannot go on, each as its branch."""
  if wrong := [row for row in rows if not 0 <= row < count]:
    raise UserError(
      f"select: found row {wrong[0]}, expected one of {count} rows"
    )
  pairs = list(zip(rows, branch, strict=True))
  if len(set(pairs)) < len(pairs):
    twice = next(x for x in pairs if pairs.count(x) > 1)
    raise UserError(
      f"select: found row {twice[0]} twice as branch {twice[1]}, expected a"
      " branch of its own for each copy: they would draw the same tokens"
    )


def joined(parts: Sequence[GeneratedTokens], done: Any) -> GeneratedTokens:
  """Returns the tokens of several programs as those of one, on the host."""
  if not parts:
    none = np.zeros((len(done), 0), np.int32)
    return GeneratedTokens(none, np.asarray(done), none.astype(np.float32))
  tokens = np.concatenate([np.asarray(x.tokens) for x in parts], axis=1)
  used = np.any(tokens != NO_TOKEN, axis=0)
  scores = None
  if parts[0].log_probs is not None:
    scores_of_parts = [np.asarray(x.log_probs) for x in parts]
    scores = np.concatenate(scores_of_parts, axis=1)[:, used]
  return GeneratedTokens(tokens[:, used], np.asarray(done), scores)
