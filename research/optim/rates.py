"""Learning rates that differ by path.

A rate is `factor(path) * schedule(step)`: the schedule is the run's, and the
factors are fixed. In a chain the factors stand behind weight decay and before
`optim.scale_by_rate`, so that decay goes at each path's own rate, as in
torch's parameter groups. (`optax.partition` would need a label and a
transformation for each factor; `test_optim.py` finds the same updates.)
"""

import re
from collections.abc import Callable, Sequence

import optax

from research import tree
from research.optim import optim
from research.typing import Array

Factor = Callable[[str, Array], float]
"""(path, parameter) -> what its rate is multiplied by."""


def table(
  rows: Sequence[tuple[str, float | int]], rest: float | int = 1.0
) -> Factor:
  """Returns the factor of the first row whose pattern is found in a path.

  Args:
    rows: (regular expression, factor).
    rest: for paths that no row matches; 0 keeps them where they are.
  """

  def factor(path: str, x: Array) -> float:
    del x
    found = (value for row, value in rows if re.search(row, path))
    return float(next(found, rest))

  return factor


def scale_by_path(factor: Factor) -> optax.GradientTransformation:
  """Returns a transformation that multiplies each array's update.

  Args:
    factor: of a path and an update.
  """

  def update(updates, state, params=None):
    del params

    def one(path, u):
      return (factor(path, u) * u).astype(u.dtype)

    return tree.map_paths(one, updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def adamw(
  learning_rate: optim.Number | optim.Schedule,
  factor: Factor,
  *,
  b1: optim.Number = 0.9,
  b2: optim.Number = 0.999,
  eps: optim.Number = 1e-8,
  weight_decay: optim.Number = 0.0,
  decayed: Callable[[str, Array], bool] = lambda path, x: True,
  clip: optim.Number | None = 1.0,
) -> optax.GradientTransformation:
  """Returns AdamW with rates that differ by path.

  Args:
    learning_rate: a number, or a schedule of the updates done.
    factor: of each path's rate.
    b1: decay of the mean.
    b2: decay of the mean square.
    eps: added to the root of the mean square.
    weight_decay: share of a parameter taken off at rate 1.
    decayed: whether a parameter decays.
    clip: bound of the gradient's global norm, or None.
  """

  def mask(params):
    return tree.map_paths(decayed, params)

  return optax.chain(
    optim.clipped(clip),
    optim.moments(b1, b2, eps),
    optim.decaying(weight_decay, mask),
    scale_by_path(factor),
    optim.scale_by_rate(learning_rate),
  )


def ndim(path: str, x: Array) -> int:
  """Returns the axes of a parameter without that of a run's layers."""
  return x.ndim - bool(re.match(r"(.*/)?run\d+/", path))
