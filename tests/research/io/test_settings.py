"""Texts of dataclasses: each is read back as what it was written from."""

import dataclasses
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.io.settings import Form, Forms, check, setting, show
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circle:
  """A member with a field that is required, and one of words."""

  radius: float
  unit: Literal["m", "km"] = "m"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Box:
  """A member whose name decides about a field."""

  width: int = 2
  height: int | None = None
  round: bool = False

  def __post_init__(self):
    if self.width > 9999:
      raise UserError(f"Box: width is {self.width}, expected at most 9999")


SHAPES = Forms(
  (
    Form("none", None),
    Form("circle", Circle),
    Form("box", Box, dict(round=False)),
    Form("pill", Box, dict(round=True)),
  )
)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.one_of(
  st.none(),
  st.builds(Circle, radius=FINITE, unit=st.sampled_from(["m", "km"])),
  st.builds(
    Box,
    width=st.integers(0, 9999),
    height=st.none() | st.integers(0, 999_999),
    round=st.booleans(),
  ),
)


@given(VALUES)
def test_a_text_is_read_back_as_its_value(value):
  assert SHAPES.parse(SHAPES.text(value)) == value


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("none", None),
    ("circle:0.5", Circle(radius=0.5)),
    ("circle:2,unit=km", Circle(radius=2.0, unit="km")),
    ("box:2", Box()),
    ("pill:3", Box(width=3, round=True)),
    ("box:2,height=4", Box(height=4)),
  ],
)
def test_texts(text, value):
  assert SHAPES.parse(text) == value and SHAPES.text(value) == text


def test_a_value_that_has_no_text_is_still_shown():
  assert SHAPES.text(7) == "7"


def test_a_first_field_that_is_the_default_need_not_be_given():
  assert SHAPES.parse("box") == Box() == SHAPES.parse("box:2")
  assert SHAPES.parse("pill,height=1") == Box(height=1, round=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
  """Settings of which each has one way to be wrong."""

  count: int | None = setting(None, "A number.", least=1)
  share: float = setting(0.5, "A number.", least=0.0, most=1.0)
  plan: Literal["even", "dream"] = setting("even", "A word.")
  shape: Circle | Box | None = setting(None, "A shape.", forms=SHAPES)
  size: int = 0

  def __post_init__(self):
    check(self)


def test_settings_say_what_they_are():
  assert show(Checked(shape=Circle(radius=2.0)), "shape") == "shape=circle:2"
  assert show(Checked(), "share") == "share=0.5"


@pytest.mark.parametrize(
  ("wrong", "words"),
  [
    (dict(count=0), "count=0: expected a whole number of at least 1"),
    (dict(share=float("nan")), "share=nan: expected a number from 0.0 to 1.0"),
    (dict(share=1.5), "share=1.5: expected a number from 0.0 to 1.0"),
    (dict(plan="odd"), "plan=odd: expected even or dream"),
  ],
)
def test_a_setting_out_of_bounds(wrong, words):
  assert Checked(size=-1, count=1)
  with pytest.raises(UserError) as found:
    Checked(**wrong)
  assert str(found.value) == words


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("", "expected none, circle:RADIUS[,unit=UNIT], box[:WIDTH][,height=HEI"),
    ("cone:1", "or pill[:WIDTH][,height=HEIGHT]"),
    ("box,height", "expected none, circle"),
    ("box,height=1,height=2", "expected none, circle"),
    ("none:1", "found :1, expected none alone"),
    ("none,height=1", "found height=, expected nothing"),
    ("circle", "expected circle:RADIUS[,unit=UNIT]"),
    ("circle:x", "radius is 'x', expected a number"),
    ("circle:nan", "radius is 'nan', expected a number"),
    ("circle:1,unit=mile", "unit is 'mile', expected m or km"),
    ("box:1.5", "width is '1.5', expected a whole number"),
    ("box:-1", "width is '-1', expected a whole number"),
    ("box,width=3", "found width=, expected height"),
    ("box:10000", "Box: width is 10000, expected at most 9999"),
  ],
)
def test_mistakes(text, words):
  with pytest.raises(UserError) as found:
    SHAPES.parse(text)
  assert words in str(found.value)
