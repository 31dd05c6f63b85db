"""Views cut into an encoder's patches."""

import numpy as np
from jaxtyping import Int32, Shaped

from research.errors import UserError


def patchify(
  view: Shaped[np.ndarray, "H W 3"], patch: int, merge: int = 1
) -> tuple[Shaped[np.ndarray, "P patch patch 3"], Int32[np.ndarray, "P 2"]]:
  """Returns a view's patches and the (row, column) of each.

  Args:
    view: pixels, whole patches each way.
    merge: patches of a merge x merge group follow each other, as in Qwen2-VL,
      so that a merger's groups are contiguous; 1 goes row by row.

  A patch's values are in the order (y, x, channel). Qwen's files want (channel,
  frame, y, x), each frame twice; SigLIP 2, Gemma 4 and Molmo want this one.
  """
  height, width, _ = view.shape
  step = patch * merge
  if height % step or width % step:
    raise UserError(
      f"a view of {height} x {width} pixels: expected multiples of {step} "
      f"(patch {patch} x merge {merge}), as the tiling's plan has them"
    )
  rows, columns = height // step, width // step
  groups = view.reshape(rows, merge, patch, columns, merge, patch, 3)
  patches = groups.transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, patch, patch, 3)
  grid = np.indices((rows * merge, columns * merge), dtype=np.int32)
  grid = grid.reshape(2, rows, merge, columns, merge).transpose(1, 3, 2, 4, 0)
  return patches, grid.reshape(-1, 2)
