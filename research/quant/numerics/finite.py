"""Refusing what no grid can hold: infinities and NaN.

A scale is made of a group's largest number, so that one infinity or NaN ruins
its group, and most encoders then give finite numbers that look like weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.typing import Array, Bool, Shaped, UserError


@jax.jit
def _all_finite(w: Shaped[Array, "*W"]) -> Bool[Array, ""]:
  return jnp.isfinite(w).all()


def check(w: Any, where: str) -> None:
  """Raises UserError unless all numbers of a matrix, or of a stack, are finite.

  Args:
    w: an array of JAX or NumPy. What is traced has no numbers yet: nothing is
      said of it.
    where: its address.
  """
  if isinstance(w, jax.core.Tracer | jax.ShapeDtypeStruct):
    return
  if isinstance(w, np.ndarray) and w.dtype.kind == "f":
    # Its ends are NaN or infinite if anything is, and need no second array.
    fine = not w.size or np.isfinite([w.min(), w.max()]).all()
  else:
    fine = bool(_all_finite(w))
  if fine:
    return
  bad = ~np.isfinite(np.asarray(w))
  first = tuple(int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
  raise UserError(
    f"{where}: {int(bad.sum())} of {bad.size} weights are not finite, the "
    f"first is {float(np.asarray(w)[first])} at {list(first)}; expected "
    "finite weights: a grid's scale follows from its largest number.\nMend "
    "the model, or leave this matrix as it is"
  )
