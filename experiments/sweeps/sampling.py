"""Units drawn at random: `{'sample': AXES, 'count': N, 'seed': SEED}`.

An axis is a list, of whose values each is as likely as the others, or
`{'log_uniform': (LOW, HIGH)}`: numbers whose logarithm is uniform, as learning
rates are searched (Bergstra and Bengio, JMLR 13, 2012: random points find good
values of the axes that matter with fewer runs than a grid).

A draw depends on the seed, the binding and the number of the draw alone: more
units, or another axis, leave the values of the others as they are.
"""

import random
from collections.abc import Mapping
from typing import Any

from research.typing import UserError

DIGITS = 4
"""Significant digits of a drawn number; the unit's name shows all of them."""

DRAWS_PER_UNIT = 1000
"""Draws, for each unit, after which there seem to be no other units."""


def sample(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns `count` different units.

  Args:
    tree: `sample`, a mapping from binding to axis; `count`; `seed`, 0 by
      default.

  Raises:
    UserError: it is no such tree, or its axes have fewer combinations.
  """
  unknown = sorted(set(tree) - {"sample", "count", "seed"})
  axes, count, seed = tree["sample"], tree.get("count"), tree.get("seed", 0)
  if unknown:
    raise UserError(
      f"sweep: found {unknown} next to 'sample', expected 'count' and 'seed';"
      " combine others with it in a 'product'."
    )
  if not isinstance(axes, Mapping) or not axes:
    raise UserError(
      f"sweep: 'sample' holds {axes!r}, expected {{'BINDING': [values]}} or"
      " {'BINDING': {'log_uniform': (LOW, HIGH)}}."
    )
  for name, value, least in (("count", count, 1), ("seed", seed, 0)):
    if type(value) is not int or value < least:
      raise UserError(
        f"sweep: 'sample' has {name!r}: {value!r}, expected an integer from"
        f" {least} on."
      )
  units: list[dict[str, Any]] = []
  for i in range(count * DRAWS_PER_UNIT):
    unit = {name: _draw(name, axis, seed, i) for name, axis in axes.items()}
    if unit not in units:
      units.append(unit)
    if len(units) == count:
      return units
  raise UserError(
    f"sweep: 'sample' has 'count': {count}, but its axes have"
    f" {len(units)} combinations; lower it, or write a grid."
  )


def _draw(name: str, axis: Any, seed: int, number: int) -> Any:
  """Returns the value of one binding in one unit."""
  # A text as the seed is hashed by SHA-512, the same in every Python.
  share = random.Random(f"{seed} {name} {number}").random()
  if isinstance(axis, list | tuple) and axis:
    return axis[int(share * len(axis))]
  bounds = axis.get("log_uniform") if isinstance(axis, Mapping) else None
  if (
    not isinstance(bounds, list | tuple)
    or len(axis) != 1
    or len(bounds) != 2
    or not all(type(x) in (int, float) for x in bounds)
    or not 0 < bounds[0] < bounds[1]
  ):
    raise UserError(
      f"sweep: 'sample' has {name}: {axis!r}, expected a list of values or"
      " {'log_uniform': (LOW, HIGH)} with 0 < LOW < HIGH."
    )
  low, high = bounds
  return float(f"{low * (high / low) ** share:.{DIGITS}g}")
