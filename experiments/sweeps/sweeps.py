"""Sweeps as data: lists of units, and the algebra that makes them.

A unit is a dict from gin bindings to values. A sweep file (gin, under
`configs/sweeps/`) writes a list of units as a tree:

    {'RANK': [1, 8], 'SEED': [0, 1]}          # a grid: each with each
    {'product': [TREE, ...]}                  # the same of any trees
    {'zip': {'RANK': [1, 8], 'BATCH': [8, 4]}}  # side by side, equally long
    {'zip': [TREE, ...]}
    {'chain': [TREE, ...]}                    # one after the other
    {'sample': {'RATE': {'log_uniform': (1e-5, 1e-2)}, 'RANK': [4, 8]},
     'count': 20, 'seed': 0}                  # drawn at random
    {}                                        # one unit, without bindings

What a unit's values may be is what gin may bind; `'@...'` and `'%...'` stand
for gin's own references.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from experiments.sweeps import sampling
from research.typing import UserError

Unit = dict[str, Any]
"""Gin binding -> value."""

Units = list[Unit]

LONGEST = 100
"""Characters of a unit's name; file systems take 255 bytes."""


def over(binding: str, values: Sequence[Any]) -> Units:
  """Returns one unit a value."""
  return [{binding: value} for value in values]


def product(*parts: Units) -> Units:
  """Returns each unit of the first with each of the next, last one fastest."""
  units: Units = [{}]
  for part in parts:
    units = [_merged(unit, other) for unit in units for other in part]
  return units


def zipped(*parts: Units) -> Units:
  """Returns the first units merged, then the second ones, and so on."""
  lengths = sorted({len(part) for part in parts})
  if len(lengths) > 1:
    raise UserError(
      f"zip: found lists of {lengths} units, expected equally long ones."
    )
  return [
    {} if not units else _merged(*units) for units in zip(*parts, strict=True)
  ]


def chain(*parts: Units) -> Units:
  """Returns all units of the first, then those of the next."""
  return [unit for part in parts for unit in part]


def expand(tree: Mapping[str, Any]) -> Units:
  """Returns the units that a tree describes; see the module's docstring.

  Raises:
    UserError: it is no such tree, a binding is given twice in one unit, lists
      that are zipped differ in length, a list is empty.
  """
  if "sample" in tree:
    return sampling.sample(tree)
  for name, combine in _COMBINE.items():
    if name in tree:
      if len(tree) > 1:
        beside = sorted(set(tree) - {name})
        raise UserError(
          f"sweep: found {beside} next to {name!r}, expected it alone in its"
          " braces; put both into a 'product'."
        )
      return combine(*map(expand, _parts(name, tree[name])))
  return product(*(over(k, _values(k, v)) for k, v in tree.items()))


_COMBINE: Mapping[str, Callable[..., Units]] = {
  "product": product,
  "zip": zipped,
  "chain": chain,
}


def _parts(name: str, value: Any) -> list[Any]:
  """Returns the trees that are combined; a dict is one a binding."""
  if isinstance(value, Mapping):
    value = [{k: v} for k, v in value.items()]
  if not isinstance(value, list | tuple) or not value:
    raise UserError(
      f"sweep: {name!r} holds {value!r}, expected a list of sweeps."
    )
  for part in value:
    if not isinstance(part, Mapping):
      raise UserError(
        f"sweep: found {part!r} in {name!r}, expected"
        f" {{'BINDING': [values]}} or one of {sorted([*_COMBINE, 'sample'])}."
      )
  return list(value)


def _values(binding: str, values: Any) -> Sequence[Any]:
  if not isinstance(values, list | tuple) or not values:
    raise UserError(
      f"sweep: {binding} has {values!r}, expected a list of values, e.g."
      f" '{binding}': [1, 2]."
    )
  return values


def _merged(*units: Unit) -> Unit:
  unit: Unit = {}
  for other in units:
    for binding in other:
      if binding in unit:
        raise UserError(f"sweep: {binding} is given twice in one unit.")
    unit = {**unit, **other}
  return unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
  """A command with bindings that vary: the root of a sweep file.

  Attributes:
    config: gin file of the command.
    over: the bindings that vary, as a tree of units.
    command: what a unit runs: `python -m experiments.COMMAND`. An evaluation is
      that of the model which its configuration starts from.
    options: further flags of every unit, such as `--devices=2`.
    fixed: bindings that all units share.
    seeds: each unit is run with each of these; none for the run's own.
    seed: the binding for `seeds`.
    metric: the entry of a unit's result that is compared.
    better: whether a lower or a higher metric is better.
    axis: the binding on the plot's x axis; None for the one with most values,
      numbers first.
  """

  config: str
  over: Mapping[str, Any]
  command: Literal["train", "search", "study", "evaluate"] = "train"
  options: Sequence[str] = ()
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seeds: Sequence[int] = ()
  seed: str = "SEED"
  metric: str = "perplexity_after"
  better: Literal["lower", "higher"] = "lower"
  axis: str | None = None

  def units(self) -> Units:
    """Returns the bindings of each unit; seeds vary last and fastest."""
    units = expand(self.over)
    if self.seeds:
      units = product(units, over(self.seed, self.seeds))
    for binding in {name: None for unit in units for name in unit}:
      if binding in self.fixed:
        raise UserError(f"sweep: {binding} is fixed, and varies as well.")
    if self.axis is not None and not any(self.axis in u for u in units):
      raise UserError(f"Sweep.axis: {self.axis} varies in no unit.")
    return units


def bindings(unit: Mapping[str, Any]) -> list[str]:
  """Returns a unit as lines of gin."""
  return [f"{name} = {_gin(value)}" for name, value in unit.items()]


def _gin(value: Any) -> str:
  if isinstance(value, str) and value[:1] in ("@", "%"):
    return value
  if isinstance(value, list | tuple):
    inner = "".join(f"{_gin(x)}, " for x in value)
    return f"[{inner}]" if isinstance(value, list) else f"({inner})"
  if isinstance(value, Mapping):
    return f"{{{', '.join(f'{k!r}: {_gin(v)}' for k, v in value.items())}}}"
  return repr(value)


def name(unit: Mapping[str, Any]) -> str:
  """Returns a name that is a good file name: `RANK=8_SEED=0`.

  It depends on the unit alone, so that it stays when a sweep grows. A hash
  tells apart values that a file name cannot spell.
  """
  text = "_".join(f"{binding}={value}" for binding, value in unit.items())
  clean = re.sub(r"[^\w.=+-]+", "_", text)
  if clean == text and len(text) <= LONGEST:
    return text or "base"
  digest = hashlib.sha256(repr(sorted(unit.items())).encode()).hexdigest()
  return f"{clean[:LONGEST]}-{digest[:8]}"


def axis(units: Sequence[Unit], seed: str) -> str | None:
  """Returns the binding with most values, numbers first; None without any."""
  counts = {}
  for binding in {name: None for unit in units for name in unit}:
    values = {repr(unit[binding]) for unit in units if binding in unit}
    number = all(
      isinstance(unit[binding], int | float)
      and not isinstance(unit[binding], bool)
      for unit in units
      if binding in unit
    )
    if binding != seed:
      counts[binding] = (number and len(values) > 1, len(values))
  return max(counts, key=lambda x: counts[x]) if counts else None
