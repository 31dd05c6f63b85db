"""Flags that come from a dataclass: names, types, bounds, help, complaints."""

import dataclasses
from typing import Literal

import pytest
from absl import flags

from experiments.core import flags_from
from research.io.settings import Form, Forms, setting
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Half:
  """A value with structure."""

  share: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """A field of each type that flags have, and one without a flag."""

  length: int = setting(8, "How long.", flag="max_tokens", least=1)
  block: int | None = setting(None, "Of `length`.", least=1)
  edit: float | None = setting(None, "A share.", least=0.0, most=1.0)
  fast: bool = setting(False, "Whether.")
  plan: Literal["even", "dream"] = setting("even", "Which.")
  words: tuple[str, ...] = setting((), "Some.")
  where: str | None = setting(None, "A file.")
  policy: Half | None = setting(
    None,
    "With plan=dream: half:0.5,plan=1.",
    forms=Forms((Form("none", None), Form("half", Half))),
  )
  mask_id: int = 0

  def __post_init__(self):
    if self.block is not None and self.length % self.block:
      raise UserError(
        f"block={self.block}: does not divide length={self.length}; leave "
        "`block` out, or `mask_id`"
      )


def parsed(*arguments):
  values = flags.FlagValues()
  flags.DEFINE_bool("fast", True, "Another's.", flag_values=values)
  flags_from.define(Config, values, "Here: ")
  values(["command", *arguments])
  return values


def test_flags_that_are_not_given_are_the_defaults():
  got = flags_from.build(Config, parsed(), fast=False, mask_id=3)
  assert got == Config(mask_id=3)
  assert flags_from.build(Config, parsed()).fast  # a flag that was there


def test_flags_have_the_types_of_their_fields():
  given = "--max_tokens=4 --block=2 --edit=1 --nofast --plan=dream --words=a"
  given += " --words=b --where=x --policy=half:0.1"
  want = Config(
    length=4,
    block=2,
    edit=1.0,
    plan="dream",
    words=("a", "b"),
    where="x",
    policy=Half(share=0.1),
  )
  assert flags_from.build(Config, parsed(*given.split())) == want


@pytest.mark.parametrize("given", ["--block=0", "--edit=2", "--plan=odd"])
def test_bounds_are_those_of_the_fields(given):
  with pytest.raises(flags.Error):
    parsed(given)


def test_help_speaks_of_flags():
  values = parsed()
  assert values["block"].help == "Here: Of --max_tokens."
  assert values["policy"].help == "Here: With --plan=dream: half:0.5,plan=1."
  assert values["policy"].default == "none" and "mask_id" not in values
  assert values["fast"].help == "Another's."
  assert flags_from.names(Config)["length"] == "max_tokens"


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (
      "--block=3",
      "--block=3: does not divide --max_tokens=8; leave --block out, or "
      "`mask_id`",
    ),
    ("--policy=all", "--policy=all: expected none or half[:SHARE]"),
    ("--policy=half:x", "--policy=half:x: share is 'x', expected a number"),
  ],
)
def test_complaints_name_the_flag(given, message):
  with pytest.raises(UserError) as found:
    flags_from.build(Config, parsed(given))
  assert str(found.value) == message
