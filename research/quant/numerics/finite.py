"""Checks that weights are finite before they are quantized.

A group's scale depends on its largest number, so one infinity or NaN spoils the
whole group, and most encoders then return finite but wrong weights.
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
    w: a JAX or NumPy array; traced arrays and shapes pass unchecked.
  """
  if isinstance(w, jax.core.Tracer | jax.ShapeDtypeStruct):
    return
  if isinstance(w, np.ndarray) and w.dtype.kind == "f":
    # min and max are finite only if all are, and need no temporary array.
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
    "finite weights: a grid's scale follows from its largest number.\n"
    "Repair the model, or leave this matrix unquantized"
  )
