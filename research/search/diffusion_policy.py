"""A masked diffusion model as a policy of searches: its blocks are the steps.

Rows are filled block by block, as `diffusion.sampling.sampler` fills them, and
pause between blocks. So a block of a row is a candidate, which a verifier
judges, and paths are copied and dropped as those of `generation.Stepwise`. A
finished block can also be masked again, all of it or where the model was least
sure, and drawn anew. Rows need not be at the same block: a call fills the
blocks of each place in turn.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import weights
from research.diffusion.sampling import layout, sampler
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.denoiser import Denoiser
from research.generation import generate
from research.generation.decoding import GeneratedTokens
from research.generation.generated import NO_TOKEN
from research.generation.sampling import GREEDY, Sampling
from research.generation.stepwise import PromptReader, check_choice
from research.search.block_rows import BlockRows, copied, merged
from research.search.diffusion_cost import DenoiserCost, Passes
from research.search.ledger import Ledger
from research.search.policy import Path
from research.typing import (
  Bool,
  Params,
  PRNGKey,
  UserError,
)


@dataclasses.dataclass(frozen=True)
class GeneratedBlocks(GeneratedTokens):
  """New tokens, and the passes that drew them.

  `log_probs` are those that tokens had when they were filled in: their sum is
  the log-probability of the order in which they were.

  Attributes:
    passes: passes that drew each row's block.
  """

  passes: Sequence[Passes] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionPolicy:
  """A diffusion model, and how its rows are filled.

  Attributes:
    denoiser: how the model reads rows; `make_denoiser` returns it.
    params: its model's parameters.
    config: settings of the sampler, from `SamplerConfig.for_model`; `length`
      is that of `start`, with as many steps a block as `config` has.
    sampling: how candidates are drawn. Greedy ones differ in nothing: copies
      of a prompt need a temperature.
    reader: gives the parameters that read prompts, and what follows them;
      None: `params` do. Its mask is not used: the denoiser has its own.
  """

  denoiser: Denoiser
  params: Params
  config: SamplerConfig
  sampling: Sampling = GREEDY
  reader: PromptReader | None = None

  def __post_init__(self):
    sampler.check_sampling(self.sampling)
    config = sampler.checked_config(self.config)
    unit = self._cost.unit
    if unit not in (1, config.block):
      raise UserError(
        f"DiffusionPolicy: found {config.show('block')}, expected the model's"
        f" blocks of {unit} tokens"
      )
    if config.canvas is not None:
      raise UserError(
        f"DiffusionPolicy: found {config.show('canvas')}, expected a fixed one:"
        " blocks that are scored must not move"
      )

  @functools.cached_property
  def _cost(self) -> DenoiserCost:
    return DenoiserCost(self.denoiser, self.params)

  @functools.cached_property
  def _block(self) -> SamplerConfig:
    return self.config.of_block

  @property
  def stop_tokens(self) -> Sequence[int]:
    """Those that end a text; none where the sampler goes on behind them."""
    return self.config.end if self.config.stop_early else ()

  # --- rows ---

  def begin(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    key: PRNGKey | None = None,
    copies: int = 1,
  ) -> BlockRows:
    """Returns `copies` rows for each prompt, all masks.

    A prompt that ends within a block of the model takes part of the room: rows
    have `max_new_tokens` places from the beginning of that block on.

    Args:
      prompts: P of them, token ids.
      max_new_tokens: maximum per row, a multiple of the block.
      key: random key of the sampling; seed 0 by default.
      copies: rows that continue each prompt, one after the other.

    Raises:
      UserError: a prompt is empty, too long, or has ids that it must not have;
        or numbers do not fit.
    """
    self._check(prompts, max_new_tokens, copies)
    unit, mask = self._cost.unit, self.config.mask_id
    # Places that a prompt has of its first block.
    inside = [len(prompt) % unit for prompt in prompts]
    rows = [
      [*prompt, *[mask] * (max_new_tokens - n)]
      for prompt, n in zip(prompts, inside, strict=True)
    ]
    known = max(len(p) - n for p, n in zip(prompts, inside, strict=True))
    width = layout.width(known, max_new_tokens, unit)
    padded = layout.pad_rows(rows, mask, max_new_tokens, width, unit)
    once = padded.tokens, padded.masked, padded.valid
    key = jax.random.key(0) if key is None else key
    memory, total = None, len(prompts) * copies
    row_params = None if self.reader is None else self.reader(prompts)
    if self.denoiser.caches_finished:
      memory = sampler.cache_finished(
        self.denoiser,
        self.params if row_params is None else row_params,
        sampler.begin(*once, key),
        jnp.int32(width),
        self.config.block,
        None,
      )
      memory = copied(memory, np.repeat(np.arange(len(prompts)), copies))
    each = [np.repeat(x, copies, axis=0) for x in once]
    return BlockRows(
      rows=sampler.begin(*each, key, jnp.arange(total)),
      first=width,
      at=np.full(total, width),
      cached=np.ones(total, bool),
      memory=memory,
      prompt=np.repeat(np.arange(len(prompts)), copies),
      row_params=row_params,
    )

  def start(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    key: PRNGKey | None = None,
    copies: int = 1,
  ) -> tuple[BlockRows, GeneratedBlocks]:
    """Returns rows after their first block; arguments as for `begin`."""
    return self.advance(self.begin(prompts, max_new_tokens, key, copies))

  def advance(self, state: BlockRows) -> tuple[BlockRows, GeneratedBlocks]:
    """Fills the next block of all rows that have not ended.

    Args:
      state: state of any rows; its buffers are used up.

    Returns:
      The state, and the new tokens `[R, K]`, of which a row that ends has those
      up to its end.
    """
    opened = ~np.asarray(state.rows.done)
    places = set(zip(state.at.tolist(), state.cached.tolist(), strict=True))
    groups = [
      (at, cached, which)
      for at, cached in sorted(places)
      if (which := opened & (state.at == at) & (state.cached == cached)).any()
    ]
    drawn = self._nothing(state)
    for at, cached, which in groups:
      new = self._filled(state, which, at, cached, len(groups) == 1)
      drawn = self._drawn(drawn, state, new, which, at)
      state = new
    return state, drawn

  def select(
    self, state: BlockRows, rows: Sequence[int], branch: Sequence[int]
  ) -> BlockRows:
    """Returns a copy of chosen rows; see `decoding.select`.

    Raises:
      UserError: there is no such row, or two would draw the same tokens.
    """
    check_choice(len(state.at), rows, branch)
    return state.select(np.array(rows, np.int32), np.array(branch, np.int32))

  def store(
    self, state: BlockRows, new: BlockRows, rows: Sequence[int]
  ) -> BlockRows:
    """Returns the rows with those of `new` in place of some.

    Args:
      state: R rows; its buffers are used up.
      new: rows of the same prompts.
      rows: where each row of `new` goes; R or more: nowhere.
    """
    return state.store(new, np.array(rows, np.int32))

  def remask(
    self,
    state: BlockRows,
    rows: Sequence[bool],
    share: float | int = 1.0,
    draw: int = 0,
  ) -> BlockRows:
    """Returns a copy in which some rows have their last block masked again.

    Each goes on with that block, by random numbers of its own, and with what
    remains of the block in sight. What stands behind an end of the text is
    masked again as well.

    Args:
      state: state of any rows.
      rows: which of them; others stay as they are.
      share: share of the block's tokens that are masked again, rounded up:
        those that were least likely when they were filled in.
      draw: from 0. Who draws a block of the same state several times, and drops
        what comes of it, gives each another number: it is another draw.

    Raises:
      UserError: a row has no finished block, or the share is not above 0 and at
        most 1.
    """
    if not 0 < share <= 1:
      raise UserError(f"remask: share is {share}, expected above 0, at most 1")
    which, size = np.array(rows, bool), self.config.block
    early = which & (state.at - size < state.first)
    if early.any():
      raise UserError(
        f"remask: found no finished block in row {int(np.argmax(early))},"
        " expected one to mask again"
      )
    ends = np.array(self.stop_tokens, np.int32)
    return state.masked_again(
      which, share, self.config.mask_id, size, ends, draw
    )

  def append(
    self, state: Any, tokens: Sequence[Sequence[int]], replace: Sequence[bool]
  ) -> Any:
    """Raises UserError: blocks have no room for tokens that were not drawn."""
    del state, tokens, replace
    raise UserError(
      "append: found a diffusion policy, whose blocks have fixed places;"
      " expected an autoregressive one, such as generation.Stepwise"
    )

  def done(self, state: BlockRows) -> Bool[np.ndarray, " R"]:
    return np.asarray(state.rows.done)

  def end(self, state: BlockRows, rows: Bool[np.ndarray, " R"]) -> BlockRows:
    done = state.rows.done | rows
    return dataclasses.replace(
      state, rows=dataclasses.replace(state.rows, done=done)
    )

  # --- what they cost ---

  def prompt(self, tokens: int) -> Ledger:
    """Returns what all paths of a prompt share: a cache's pass over it."""
    return Ledger(
      policy_prefill_tokens=tokens,
      flops_policy=self._cost.prompt(tokens)
      + (0 if self.reader is None else self.reader.flops),
      peak_cache_tokens=self._cost.shared(tokens),
    )

  def steps(
    self, paths: Sequence[Path], drawn: GeneratedBlocks
  ) -> list[Ledger]:
    """Returns what each path's block costs, every pass of it.

    Tokens are counted once, as they are written, however many passes read them.
    """
    ledgers = []
    for path, row, passes in zip(
      paths, drawn.tokens, drawn.passes, strict=True
    ):
      count = int((row != NO_TOKEN).sum())
      cached = self._cost.cached(
        path.prompt + len(path.tokens) + count, passes.row
      )
      ledgers.append(
        Ledger(
          policy_decode_tokens=count,
          flops_policy=self._cost.block(passes),
          peak_cache_tokens=max(0, cached - self._cost.shared(path.prompt)),
        )
      )
    return ledgers

  # --- one block ---

  def _filled(
    self,
    state: BlockRows,
    which: Bool[np.ndarray, " R"],
    at: int,
    cached: bool,
    alone: bool,
  ) -> BlockRows:
    """Returns rows, some of which have the block at `at` filled.

    Args:
      state: state whose memory is used up.
      which: rows that are at that block.
      at: where it begins.
      cached: whether their cache has all before it.
      alone: whether no other row has a use for its cache.
    """
    rows = dataclasses.replace(state.rows, done=jnp.asarray(~which))
    memory, size = state.memory, self.config.block
    params = state.params(self.params)
    if memory is not None:
      if not alone:
        memory = copied(memory, np.arange(len(which)))
      if not cached:
        memory = sampler.cache_finished(
          self.denoiser, params, rows, jnp.int32(at), size, memory
        )
    rows, finite, memory = sampler.fill_block(
      *(self.denoiser, params, rows, jnp.int32(at)),
      *(self._block, self.sampling, memory),
    )
    sampler.checked(finite, f"of the block at {at}")
    if memory is not None and not alone:
      targets = np.where(which, np.arange(len(which)), len(which))
      memory = merged(state.memory, memory, targets)
    last = at + size == rows.tokens.shape[1]
    done = jnp.where(which, rows.done | last, state.rows.done)
    return dataclasses.replace(
      state,
      rows=dataclasses.replace(rows, done=done),
      at=np.where(which, at + size, state.at),
      cached=state.cached & ~which,
      memory=memory,
    )

  def _nothing(self, state: BlockRows) -> GeneratedBlocks:
    """Returns no token of any row."""
    places = np.asarray(state.rows.valid).sum(axis=1).tolist()
    tokens = np.full((len(places), self.config.block), NO_TOKEN, np.int32)
    return GeneratedBlocks(
      tokens=tokens,
      done=np.asarray(state.rows.done),
      log_probs=np.zeros(tokens.shape, np.float32),
      passes=[Passes(n, 0, 0, 0, 0) for n in places],
    )

  def _drawn(
    self,
    drawn: GeneratedBlocks,
    before: BlockRows,
    after: BlockRows,
    which: Bool[np.ndarray, " R"],
    at: int,
  ) -> GeneratedBlocks:
    """Returns `drawn` with the block that some rows got."""
    size, rows = self.config.block, after.rows
    tokens, fixed, valid, confidence = (
      np.asarray(x)[:, at : at + size]
      for x in (rows.tokens, rows.fixed, rows.valid, rows.confidence)
    )
    is_new = valid & ~fixed & which[:, None]
    ends = is_new & np.isin(tokens, self.stop_tokens)
    # Behind the first end the sampler has filled the row up.
    is_new &= np.cumsum(ends, axis=1) - ends == 0
    scores = np.log(np.maximum(confidence, np.finfo(np.float32).tiny))
    counts = np.asarray(rows.count) - np.asarray(before.rows.count)
    begins = np.argmax(np.asarray(rows.valid), axis=1)
    passes = [
      Passes(
        row=previous.row,
        start=at - int(begins[i]),
        block=size,
        count=int(counts[i]) * self.denoiser.passes,
        read=0 if before.cached[i] or before.memory is None else size,
      )
      if which[i]
      else previous
      for i, previous in enumerate(drawn.passes)
    ]
    return GeneratedBlocks(
      tokens=np.where(is_new, tokens, drawn.tokens),
      done=np.asarray(rows.done),
      log_probs=np.where(is_new, scores, drawn.log_probs),
      passes=passes,
    )

  def _check(
    self, prompts: Sequence[Sequence[int]], max_new_tokens: int, copies: int
  ) -> None:
    """Raises UserError for numbers and prompts that rows cannot have."""
    model, block = self.denoiser.model, self.config.block
    if copies < 1:
      raise UserError(f"copies: found {copies}, expected at least 1")
    if max_new_tokens < 1 or max_new_tokens % block:
      raise UserError(
        f"max_new_tokens: found {max_new_tokens}, expected a multiple of the"
        f" block of {block} tokens"
      )
    extra = weights.extra_ids(self.params)
    generate.token_limits(model, prompts, max_new_tokens, extra)
    layout.check_prompts([list(x) for x in prompts], self.config.mask_id)
    longest, most = max(map(len, prompts)), model.max_positions
    if most is not None and longest + max_new_tokens > most:
      raise UserError(
        f"prompts: found up to {longest} tokens, and {max_new_tokens} new ones,"
        f" expected at most {most} together, the model's context"
      )
