"""What scores must be before anything is made of them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from research.errors import UserError

Scores = Sequence[float | int] | np.ndarray
"""Of a trace's steps, first to last."""


def finite(scores: Scores) -> Float[np.ndarray, "T"]:
  """Returns the scores as an array.

  Raises:
    UserError: they are not one a step, or one is NaN or infinite: such a score
      compares as false with everything, and would silently pass or fail.
  """
  values = np.asarray(scores, float)
  if values.ndim != 1:
    raise UserError(f"scores: found shape {values.shape}, expected one a step")
  if not np.isfinite(values).all():
    at = int(np.flatnonzero(~np.isfinite(values))[0])
    raise UserError(
      f"scores[{at}]: found {values[at]}, expected a finite number; did the"
      " verifier diverge, or overflow in half precision?"
    )
  return values


def probabilities(scores: Scores) -> Float[np.ndarray, "T"]:
  """Returns the scores as an array.

  Raises:
    UserError: they are not finite, or not 0 to 1.
  """
  values = finite(scores)
  if not ((values >= 0) & (values <= 1)).all():
    raise UserError(
      f"scores: found {values.tolist()!s:.80}, expected probabilities, 0 to 1;"
      " apply the sigmoid to logits"
    )
  return values
