"""What a pass of a diffusion model costs, by how its denoiser reads rows.

Places that a pass reads run through the layers, and logits are formed of the
block alone. Padding is left out, and so are keys that a mask hides, as in
`research.nn.flops`; what a cache makes a program read again is counted.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

from research.diffusion.sampling.block_causal import BlockCausal
from research.diffusion.sampling.denoiser import BlockCache, Denoiser, NoCache
from research.diffusion.sampling.prefix_cache import PrefixCache
from research.nn.flops import Blockwise, Dense, ModelCost, model_cost
from research.typing import UserError

Counted = NoCache | BlockCache | PrefixCache | BlockCausal
"""Denoisers whose passes have a closed form."""


class Passes(NamedTuple):
  """One block of one row.

  Attributes:
    row: places of the whole row, without padding.
    start: places before the block.
    block: places of the block.
    count: passes in which the row took part.
    read: places of finished blocks that a cache got first.
  """

  row: int
  start: int
  block: int
  count: int
  read: int


@dataclasses.dataclass(frozen=True)
class DenoiserCost:
  """The cost of a denoiser's passes.

  Attributes:
    denoiser: how rows are read.
    params: its model's parameters, whose adapters count, or None.
  """

  denoiser: Denoiser
  params: Any = None

  def __post_init__(self):
    if not isinstance(self.denoiser, Counted):
      raise UserError(
        f"DenoiserCost: found {type(self.denoiser).__name__}, expected no cache"
        " or one of prefix, dual and vicinity, without guidance or credit; the"
        " FLOPs of others depend on what they read"
      )

  @functools.cached_property
  def model(self) -> ModelCost:
    """The model's."""
    return model_cost(self.denoiser.model, params=self.params)

  @property
  def unit(self) -> int:
    """Tokens of a block of the model, which begin where rows do; or 1."""
    return block_of(self.denoiser) or 1

  def shared(self, tokens: int) -> int:
    """Returns the tokens of a prompt in a cache that its paths share."""
    whole = tokens // self.unit * self.unit
    return whole if isinstance(self.denoiser, BlockCausal) else 0

  def prompt(self, tokens: int) -> int:
    """Returns the FLOPs of those."""
    read = self.shared(tokens)
    return self.model.forward(read, Blockwise(read, self.unit), 0)

  def cached(self, tokens: int, row: int) -> int:
    """Returns the tokens in the cache of one path, shared ones included.

    Args:
      tokens: length of prompt and path.
      row: places of the whole row.
    """
    if isinstance(self.denoiser, NoCache):
      return 0
    return tokens if isinstance(self.denoiser, BlockCausal) else row

  def block(self, passes: Passes) -> int:
    """Returns the FLOPs of all passes of a block."""
    row, start, size, count, read = passes
    forward = self.model.forward
    if isinstance(self.denoiser, BlockCausal):
      before = forward(read, Dense(read, start), 0)
      return before + count * forward(size, Dense(size, start + size), size)
    whole = Dense(row, row)
    if self.unit > 1:
      whole = Blockwise(row, self.unit)
    first = forward(row, whole, size)
    if isinstance(self.denoiser, NoCache):
      return count * first
    span = row - start
    if isinstance(self.denoiser, BlockCache):
      span = min(self.denoiser.before + size + self.denoiser.after, row)
    return first + (count - 1) * forward(span, Dense(span, row), size)


def block_of(denoiser: Denoiser) -> int | None:
  """Returns the tokens of a block-causal model's block, or None."""
  blocks = isinstance(denoiser, NoCache | BlockCausal)
  return denoiser.block if blocks else None
