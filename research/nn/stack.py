"""Which layers a model has, as a value: a pattern of blocks, repeated."""

import dataclasses

from research import tree
from research.nn.block import Block
from research.typing import Params, UserError


@dataclasses.dataclass(frozen=True)
class Stack:
  """`depth` layers; layer `i` is `blocks[i % len(blocks)]`.

  Plain data, not a Linen module: the blocks inside stay unbound, so that they
  compare and hash as the values they are.
  """

  depth: int
  blocks: tuple[Block, ...]

  def kinds(self) -> tuple[Block, ...]:
    """Returns each layer's block, first to last."""
    return tuple(self.blocks[i % len(self.blocks)] for i in range(self.depth))

  def runs(self, params: Params) -> list[tuple[str, int, tuple[Block, ...]]]:
    """Returns each run's name, repeats and period of blocks.

    Args:
      params: a tree with runs, whose shapes decide; without any, the runs are
        those of a fresh initialisation.

    Raises:
      UserError: the tree holds another number of layers, or scans over layers
        that differ.
    """
    kinds, start, out = self.kinds(), 0, []
    names = tree.runs(params)
    shapes = tree.plan(kinds)
    if names:
      shapes = [(tree.run_length(params[k]), len(params[k])) for k in names]
    found = sum(n * p for n, p in shapes)
    if found != self.depth:
      raise UserError(
        f"the parameters hold {found} layers, the model has {self.depth}"
      )
    for i, (n, p) in enumerate(shapes):
      blocks = kinds[start : start + p]
      if kinds[start : start + n * p] != blocks * n:
        raise UserError(f"run{i} scans over layers of different kinds")
      out.append((f"run{i}", n, blocks))
      start += n * p
    return out
