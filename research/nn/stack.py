"""The layer stack of a model: a repeated pattern of blocks."""

import dataclasses

from flax import linen as nn

from research import tree
from research.typing import Params, UserError


@dataclasses.dataclass(frozen=True)
class Stack:
  """`depth` layers; layer `i` is `blocks[i % len(blocks)]`.

  A plain dataclass, not a Linen module: its blocks stay unbound, so they
  compare and hash by value. They are of any kind that the model's `layer`
  function applies (`layers.run_layers`): `Block`, or a Q-Former's.
  """

  depth: int
  blocks: tuple[nn.Module, ...]

  def kinds(self) -> tuple[nn.Module, ...]:
    """Returns each layer's block, first to last."""
    return tuple(self.blocks[i % len(self.blocks)] for i in range(self.depth))

  def runs(
    self, params: Params
  ) -> list[tuple[str, int, tuple[nn.Module, ...]]]:
    """Returns `(name, repeats, period of blocks)` for each scanned run.

    Args:
      params: a parameter tree, whose runs are used. If it has none, returns the
        runs of a new initialisation.

    Raises:
      UserError: `params` has another number of layers, or a run of it scans
        over layers of different kinds.
    """
    kinds, start, out = self.kinds(), 0, []
    names = tree.runs(params)
    shapes = tree.plan(kinds)
    if names:
      shapes = [(tree.run_length(params[k]), len(params[k])) for k in names]
    depth = sum(n * p for n, p in shapes)
    if depth != self.depth:
      raise UserError(
        f"the parameters hold {depth} layers, the model has {self.depth}"
      )
    for i, (n, p) in enumerate(shapes):
      blocks = kinds[start : start + p]
      if kinds[start : start + n * p] != blocks * n:
        raise UserError(f"run{i} scans over layers of different kinds")
      out.append((f"run{i}", n, blocks))
      start += n * p
    return out
