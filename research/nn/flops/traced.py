"""Counts the FLOPs of matrix products in a traced function.

These are the model's FLOPs. A compiled program may do more: it may recompute,
or repeat work on several devices.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax

from research.sharding import spec_axes


def count_flops(f: Any, *args: Any) -> float:
  """Returns the FLOPs of `f(*args)`, summed over all devices.

  A multiply-add counts as two. Loops with a data-dependent length count once;
  of several branches, the most expensive one counts, but of those for different
  platforms the default: another may pad or repeat products for its hardware.

  Args:
    f: a pure function.
    args: arrays or shape structs.
  """
  return _jaxpr(jax.make_jaxpr(f)(*args).jaxpr)


def _jaxpr(jaxpr: Any) -> float:
  return float(sum(map(_equation, jaxpr.eqns)))


def _equation(e: Any) -> float:
  name, shapes = e.primitive.name, [v.aval.shape for v in e.invars]
  if name == "dot_general":
    (contracted, _), _ = e.params["dimension_numbers"]
    inner = math.prod(shapes[0][d] for d in contracted)
    return 2.0 * math.prod(e.outvars[0].aval.shape) * inner
  if name == "ragged_dot_general":
    numbers = e.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    inner = math.prod(shapes[0][d] for d in numbers[0][0])
    total = 2.0 * math.prod(e.outvars[0].aval.shape) * inner
    # A gradient of the groups' matrices: each row is in one of the groups.
    return total / shapes[2][-1] if _sums_over_rows(e) else total
  if name == "cond":
    branches = [_jaxpr(branch.jaxpr) for branch in e.params["branches"]]
    platforms = e.params.get("branches_platforms") or ()
    if None in platforms:
      return branches[platforms.index(None)]
    return max(branches)
  inner = float(sum(map(_jaxpr, _inside(e))))
  if name == "shard_map":
    return inner * _shards(e)
  return inner * e.params["length"] if name == "scan" else inner


def _sums_over_rows(e: Any) -> bool:
  """Whether a grouped product contracts the rows that are in groups."""
  numbers = e.params["ragged_dot_dimension_numbers"]
  (contracted, _), _ = numbers.dot_dimension_numbers
  return set(numbers.lhs_ragged_dimensions) <= set(contracted)


def _shards(e: Any) -> int:
  """Returns how many parts of the work of a `shard_map` differ.

  Along axes that cut none of its operands, devices repeat it.
  """
  specs, sizes = e.params["in_specs"], e.params["mesh"].shape
  cut = {
    a for spec in specs for axes in spec_axes(spec, len(spec)) for a in axes
  }
  return math.prod(sizes[axis] for axis in cut)


def _inside(e: Any) -> Iterator[Any]:
  """Yields the jaxprs that an equation calls."""
  if e.primitive.name.startswith("custom_"):
    # Only the function itself, not its derivative rules.
    names = ("call_jaxpr", "fun_jaxpr", "jaxpr", "call")
    yield _open(next(e.params[k] for k in names if k in e.params))
    return
  for value in e.params.values():
    for x in value if isinstance(value, tuple | list) else (value,):
      if hasattr(_open(x), "eqns"):
        yield _open(x)


def _open(x: Any) -> Any:
  return getattr(x, "jaxpr", x)
