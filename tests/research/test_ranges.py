"""Ranges of fields: each declared one is checked, and holds for defaults."""

import dataclasses
import functools
import importlib
import inspect
import itertools
import math
import pathlib
import re
import types
from typing import Annotated, Any, Union, get_args, get_origin

import jax.numpy as jnp
import pytest

from research import ranges
from research.errors import UserError
from research.ranges import Choice, Range, Ranged

ROOT = pathlib.Path(__file__).resolve().parents[2]


def ranged_files() -> list[pathlib.Path]:
  """Returns the files with a class that has `Ranged` among its ancestors."""
  bases = {
    path: re.findall(r"^class (\w+)\(([^:]*)\):", path.read_text("utf-8"), re.M)
    for package in ("research", "experiments")
    for path in sorted((ROOT / package).rglob("*.py"))
  }
  names, count = {"Ranged"}, 0
  while len(names) > count:
    count = len(names)
    for name, words in itertools.chain.from_iterable(bases.values()):
      if names & set(re.findall(r"\w+", words)):
        names.add(name)
  return [path for path, pairs in bases.items() if names & set(dict(pairs))]


@functools.cache
def ranged_classes() -> list[type]:
  """Returns all classes with a declared range, of all modules."""
  for path in ranged_files():
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    importlib.import_module(name.removesuffix(".__init__"))
  classes, left = [], [Ranged]
  while left:
    for cls in left.pop().__subclasses__():
      left.append(cls)
      ours = cls.__module__.startswith(("research.", "experiments."))
      if ours and not inspect.isabstract(cls):
        classes.append(cls)
  return classes


def outside(kind: Any) -> list[Any]:
  """Returns values of a type that are outside of its ranges."""
  origin, arms = get_origin(kind), get_args(kind)
  if origin is Annotated:
    [bound] = kind.__metadata__
    if isinstance(bound, Choice):
      return ["no such choice" if str in _types(bound) else -12345]
    whole, nan = arms[0] is int, [] if arms[0] is int else [math.nan]
    step = 1 if whole else 1e-3
    values = [
      *([bound.at_least - step] if bound.at_least > -math.inf else []),
      *([bound.above, bound.above - 1] if bound.above > -math.inf else []),
      *([bound.at_most + step] if bound.at_most < math.inf else []),
      *([bound.below, bound.below + 1] if bound.below < math.inf else []),
      *([bound.at_least + 1] if bound.multiple else []),
      *([] if whole or bound.infinite else [math.inf]),
    ]
    fraction = [max(bound.at_least, 0) + 0.5] if whole else []
    return [*values, *nan, *fraction, "8", True]
  if origin in (Union, types.UnionType):
    return [value for arm in arms for value in outside(arm)]
  if origin is tuple and arms[-1] is not Ellipsis:
    inner = [inside(arm) for arm in arms]
    return [
      (*inner[:i], value, *inner[i + 1 :])
      for i, arm in enumerate(arms)
      for value in outside(arm)
    ]
  return [(value,) for arm in arms[:1] for value in outside(arm)]


def inside(kind: Any) -> Any:
  """Returns a value within the ranges of a type; None if it has none."""
  origin, arms = get_origin(kind), get_args(kind)
  if origin is Annotated:
    [bound] = kind.__metadata__
    if isinstance(bound, Choice):
      return bound.values[0]
    candidates = bound.at_least, bound.at_most, bound.above + 0.5, 1
    return next(x for x in candidates if math.isfinite(x) and x in bound)
  if origin is tuple and arms[-1] is not Ellipsis:
    return tuple(map(inside, arms))
  return None


def _types(bound: Choice) -> set[type]:
  return {type(value) for value in bound.values}


def unchecked(cls: type, **values: Any) -> Any:
  """Returns an object with the fields' defaults that nothing has checked."""
  made = object.__new__(cls)
  for field in dataclasses.fields(cls):
    value = field.default
    if value is dataclasses.MISSING:
      value = inside(ranges.ranged_fields(cls).get(field.name))
    object.__setattr__(made, field.name, values.get(field.name, value))
  return made


def test_every_declared_range_is_checked_when_an_object_is_made():
  count = 0
  for cls in ranged_classes():
    for name, kind in ranges.ranged_fields(cls).items():
      for value in outside(kind) + [None] * (get_origin(kind) is Annotated):
        count += 1
        values = value if isinstance(value, tuple) else (value,)
        found = "|".join(re.escape(repr(value)) for value in values)
        where = rf"^{cls.__name__}\.{name}(\[\d\])?"
        words = rf"{where}: found ({found}), expected [^,].+"
        with pytest.raises(UserError, match=words):
          unchecked(cls, **{name: value}).__post_init__()
  assert count > 1000


def test_defaults_are_within_their_ranges():
  for cls in ranged_classes():
    kinds = ranges.ranged_fields(cls)
    for field in dataclasses.fields(cls):
      if field.name in kinds and field.default is not dataclasses.MISSING:
        ranges.check(
          cls.__name__, kinds[field.name], **{field.name: field.default}
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Ranged):
  """One field of each kind."""

  rows: ranges.PositiveInt | None = None
  group: ranges.Whole(at_least=2, multiple=2, why="codes share bytes") = 2
  decay: ranges.Decay | Any = 0.9
  pair: tuple[ranges.PositiveInt, ranges.Share] = (1, 0.5)
  all: tuple[ranges.Between(1, 9), ...] | list = ()
  word: ranges.OneOf("a", "b", 3) = "a"
  by_name: dict[str, ranges.PositiveShare] = dataclasses.field(
    default_factory=dict
  )
  cut: ranges.Real(at_least=0, infinite=True) = math.inf


@pytest.mark.parametrize(
  ("values", "words"),
  [
    (dict(rows=0), "Settings.rows: found 0, expected at least 1, or None."),
    (
      dict(group=3),
      "Settings.group: found 3, expected a multiple of 2 and at least 2:"
      " codes share bytes.",
    ),
    (
      dict(decay=1),
      "Settings.decay: found 1, expected at least 0 and below 1.",
    ),
    (
      dict(decay=math.nan),
      "Settings.decay: found nan, expected a finite number, at least 0 and"
      " below 1.",
    ),
    (dict(pair=(0, 0.5)), "Settings.pair[0]: found 0, expected at least 1."),
    (dict(pair=(1, 2.0)), "Settings.pair[1]: found 2.0, expected 0 to 1."),
    (dict(all=[1, 10]), "Settings.all[1]: found 10, expected 1 to 9."),
    (dict(word="c"), "Settings.word: found 'c', expected a, b or 3."),
    (
      dict(by_name={"x": 0.0}),
      "Settings.by_name['x']: found 0.0, expected above 0 and at most 1.",
    ),
    (
      dict(rows="8"),
      "Settings.rows: found '8', expected a number, at least 1, or None.",
    ),
    (
      dict(group=True),
      "Settings.group: found True, expected a number, a multiple of 2 and at"
      " least 2: codes share bytes.",
    ),
    (dict(word=None), "Settings.word: found None, expected a, b or 3."),
    (
      dict(cut=-math.inf),
      "Settings.cut: found -inf, expected a finite number, at least 0.",
    ),
  ],
)
def test_an_error_says_where_what_and_what_was_expected(values, words):
  with pytest.raises(UserError) as error:
    Settings(**values)
  assert str(error.value) == words


@pytest.mark.parametrize(
  "values",
  [
    dict(rows=1, group=4, decay=0, pair=(1, 0), all=[9], word=3),
    dict(decay=jnp.array(2.0), by_name={"x": 1}, all=(1,)),
    dict(decay=lambda step: 2.0),
  ],
)
def test_values_within_and_those_without_a_number_pass(values):
  Settings(**values)


def test_bounds_of_a_range():
  assert [x in Range(above=0, at_most=1) for x in (0, 0.1, 1, 1.1)] == [
    *(False, True, True, False)
  ]
  assert [x in Range(at_least=0, below=1) for x in (-0.1, 0, 0.9, 1)] == [
    *(False, True, True, False)
  ]
