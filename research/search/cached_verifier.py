"""A verifier that reads each new token once: a Transformer with a cache.

Its rows follow the policy's: prompts are read once for all of their paths, and
where a path is copied its cache is, too. What it has read is what the policy
has written, token by token.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from research.generation import generate
from research.generation.decoding import PromptMask
from research.generation.generated import NO_TOKEN
from research.generation.stepwise import PromptReader
from research.nn.cache import Cache, put_rows, take_rows
from research.nn.transformer import Transformer, init_cache
from research.search.cost import Causal, ModelCost, model_cost
from research.search.engine import Path
from research.search.ledger import Ledger
from research.typing import Array, Float, Int, Params, UserError

Head = Callable[[Params, Float[Array, "B D"]], Float[Array, "B"]]
"""(parameters, hidden states of steps' last tokens) -> scores, 0 to 1. Each
object compiles its own program, unless it compares equal."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CachedVerifier:
  """A process reward model over the policy's tokens.

  Attributes:
    model: the Transformer, which shares the policy's vocabulary.
    params: its parameters, and those of the head.
    head: makes scores of hidden states.
    outputs: numbers that the head computes for a token; for the ledger.
    separator: tokens that the model reads after a step, before it scores it,
      where the policy does not write them; they are read for the score alone.
    prompt_room: tokens that prompts are padded for at least, as the policy's.
    reader: gives the parameters that read prompts; None: `params` do.
  """

  model: Transformer
  params: Params
  head: Head
  outputs: int = 1
  separator: tuple[int, ...] = ()
  prompt_room: int = 1
  reader: PromptReader | None = None

  @functools.cached_property
  def _cost(self) -> ModelCost:
    return model_cost(self.model, self.outputs)

  def prompt_cost(self, tokens: int) -> Ledger:
    """Returns the cost of a prompt, of which nothing is scored."""
    flops = self._cost.forward(tokens, Causal(0, tokens), 0)
    return Ledger(
      verifier_prefill_tokens=tokens,
      flops_verifier=flops + (0 if self.reader is None else self.reader.flops),
    )

  def step_cost(self, start: int, tokens: int) -> Ledger:
    """Returns the cost of a step, and of a separator if it reads one."""
    read = tokens + len(self.separator)
    return Ledger(
      verifier_new_tokens=read,
      flops_verifier=self._cost.forward(read, Causal(start, read), 1),
    )

  def start(
    self, prompts: Sequence[Sequence[int]], copies: int, max_new_tokens: int
  ) -> Cache:
    """Returns the state of `copies` rows for each prompt, read once."""
    longest = max(map(len, prompts))
    room = longest + max_new_tokens + len(self.separator)
    most = self.model.max_positions
    if most is not None and room > most:
      raise UserError(
        f"verifier: found prompts of up to {longest} tokens and"
        f" {max_new_tokens} new ones, expected at most {most} together, its"
        " context"
      )
    tokens, lengths = generate.pad_prompts(prompts, self.prompt_room)
    room = max(room, self.prompt_room + max_new_tokens + len(self.separator))
    reader = self.reader
    return _start(
      self.model,
      self.params if reader is None else reader(prompts),
      tokens,
      lengths,
      capacity=generate.bucket(room),
      copies=copies,
      mask=None if reader is None else reader.mask,
    )

  def read(
    self, state: Cache, paths: Sequence[Path], new: Int[np.ndarray, "R C"]
  ) -> tuple[Cache, Float[np.ndarray, " R"]]:
    """Returns the state after new tokens, and the scores; see `Verifier`.

    Raises:
      ValueError: for more tokens than `start` made room for, whose keys would
        overwrite those of the prompt.
    """
    del paths
    tokens, counts = generate.pad_prompts(
      [row[row != NO_TOKEN].tolist() for row in new]
    )
    self._check_room(state, counts)
    state, scores = _read(
      self.model,
      self.params,
      state,
      tokens,
      counts,
      self.head,
      self.separator,
    )
    return state, np.asarray(scores)

  def _check_room(self, state: Cache, counts: Int[np.ndarray, " R"]) -> None:
    end = int(np.max(np.asarray(state.length) + counts)) + len(self.separator)
    if end > state.capacity and _has_full_attention(self.model, self.params):
      raise ValueError(
        f"verifier: found {end} tokens, expected at most {state.capacity}, for"
        " which `start` made room; give it a larger max_new_tokens"
      )

  def select(self, state: Cache, rows: Sequence[int]) -> Cache:
    """Returns the state of chosen rows."""
    return _select(state, np.array(rows, np.int32))

  def store(self, state: Cache, new: Cache, rows: Sequence[int]) -> Cache:
    """Returns the state with rows of `new` in place of some."""
    return _store(state, new, np.array(rows, np.int32))


def _has_full_attention(model: Transformer, params: Params) -> bool:
  """Whether a layer stores all positions; a ring buffer never overflows."""
  runs = model.stack.runs(params)
  return any(
    block.attention.window is None for *_, blocks in runs for block in blocks
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
  cache = init_cache(model, params, count, capacity)
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
  jax.jit,
  static_argnames=("model", "head", "separator"),
  donate_argnames=("state",),
)
def _read(
  model: Transformer,
  params: Params,
  state: Cache,
  tokens: Int[Array, "R C"],
  counts: Int[Array, " R"],
  head: Head,
  separator: tuple[int, ...],
) -> tuple[Cache, Float[Array, " R"]]:
  last = jnp.maximum(counts - 1, 0)[:, None]
  hidden, state = model.apply(
    {"params": params}, tokens, cache=state, lengths=counts, keep=last
  )
  if separator:
    # Its cache is dropped: the next step follows the policy's own text.
    words = jnp.broadcast_to(
      jnp.array(separator, jnp.int32), (len(counts), len(separator))
    )
    hidden, _ = model.apply({"params": params}, words, cache=state)
  return state, head(params, hidden[:, -1])


_select = jax.jit(take_rows)

_store = jax.jit(put_rows, donate_argnames=("cache",))
