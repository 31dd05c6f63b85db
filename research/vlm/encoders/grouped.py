"""Views whose patches are pooled together, whichever view they are in.

Tiles of Molmo 2 overlap, and each keeps the patches that no other one has: an
odd number of them, so that some squares reach over two tiles or four.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from research.typing import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupedViews:
  """The views of rows, and which of their patches each soft token pools.

  Attributes:
    pixels: uint8 `[*B, V, H, W, 3]`, views of one size, padded at the end.
    groups: int32 `[*B, S, G]`, numbers of patches, row by row of one view after
      the other; -1 for none. Rows with fewer soft tokens have groups of none.
  """

  pixels: Any
  groups: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return self.pixels.shape

  def padded(self, count: int) -> "GroupedViews":
    """Returns NumPy arrays with groups for `count` soft tokens.

    Raises:
      UserError: there are more.
    """
    missing = count - self.groups.shape[-2]
    if missing < 0:
      raise UserError(
        f"groups: found {self.groups.shape[-2]} soft tokens, expected at most"
        f" {count}; allow more, or use a tiling that makes fewer"
      )
    width = [(0, 0)] * self.groups.ndim
    width[-2] = 0, missing
    groups = np.pad(self.groups, width, constant_values=-1)
    return dataclasses.replace(self, groups=groups)
