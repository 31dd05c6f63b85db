"""A stranger's JSON: fields take what is of their kind, and name the rest."""

import pytest

from research.io.fields import Fields
from research.typing import UserError

GOOD = {
  "integer": (1, 7, 2**24),
  "number": (1, 0.5, 1e29),
  "rate": (0, 0.25, 0.999),
  "flag": (True, False, None),
  "object": (None, {}),
}
BAD = {
  "integer": (True, 0, -1, 1.0, "1", None, 2**24 + 1, [1]),
  "number": (True, 0, -0.5, 1e30, float("nan"), float("inf"), "1", None),
  "rate": (False, 1, 1.5, -0.1, float("nan"), "0", None),
  "flag": (0, 1, "true", []),
  "object": (0, "{}", [], False),
}


def cases(of):
  return [(kind, x) for kind, values in of.items() for x in values]


@pytest.mark.parametrize("kind, x", cases(GOOD), ids=str)
def test_what_is_of_the_kind_is_taken(kind, x):
  found = getattr(Fields({"a": x}, "file.json"), kind)("a")
  expected = {"flag": bool(x), "object": None}.get(kind, x)
  assert found == expected


@pytest.mark.parametrize("kind, x", cases(BAD), ids=str)
def test_anything_else_is_an_error_that_names_it(kind, x):
  with pytest.raises(
    UserError, match="^file.json: a is .*, expected "
  ) as error:
    getattr(Fields({"a": x}, "file.json"), kind)("a")
  assert repr(x) in str(error.value)


def test_fields_that_are_left_out():
  fields = Fields({"b": None}, "file.json", {"a": 3})
  assert fields.integer("a") == 3
  assert fields.maybe_integer("b") is fields.maybe_number("c") is None
  assert fields.flag("c") is False
  fields.neutral({"b": (None, 0)})
  with pytest.raises(UserError, match="a is 3, expected None or 0"):
    Fields({"a": 3}, "x").neutral({"a": (None, 0)})
  inner = Fields({"a": {"b": "x"}}, "file.json").object("a")
  with pytest.raises(UserError, match="file.json: a: b is 'x'"):
    inner.integer("b")
