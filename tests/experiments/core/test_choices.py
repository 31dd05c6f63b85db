"""A table of dataclasses as flags: types, defaults, refusals, help."""

import dataclasses
import sys
from typing import Literal

import pytest

from experiments.core import cli
from experiments.core.choices import Choice, Choices, argument, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boil:
  """Cooks in water. It takes a while.

  Attributes:
    liquid: what the choice sets.
  """

  liquid: str
  minutes: int = option(5, "How long.", least=1)
  salt: bool = option(False, "Whether with salt.")
  grams: float | None = option(None, "How much of it.", needs="salt")
  egg: tuple[str, ...] = option((), "An egg.", required=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fry:
  """Cooks in fat."""

  size: str | None = argument("SIZE", "s", "m")
  minutes: int = option(3, "How long.")
  fat: Literal["oil", "butter"] = option("oil", "In what.")
  in_: str | None = option(None, "A pan.", flag="in")


TABLE = Choices(
  "how",
  "What to do.",
  {
    "boil": Choice(Boil, fixed={"liquid": "water"}),
    "poach": Choice(Boil, fixed={"liquid": "broth"}, unused={"minutes"}),
    "fry": Choice(Fry),
  },
)
FLAGS = cli.new_flags()
TABLE.define(FLAGS)


def main(argv):
  """Returns what was chosen."""
  del argv
  chosen = TABLE.chosen(FLAGS)
  return {"kind": type(chosen).__name__} | dataclasses.asdict(chosen)


def call(capsys, *arguments):
  status = cli.call(main, ["x", *arguments])
  out = capsys.readouterr()
  return status, out.out, out.err


@pytest.mark.parametrize(
  "arguments, chosen",
  [
    (
      ["--how=boil", "--egg=a", "--egg=b", "--salt", "--grams=2"],
      Boil(liquid="water", egg=("a", "b"), salt=True, grams=2.0),
    ),
    (["--how=poach", "--egg=a"], Boil(liquid="broth", egg=("a",))),
    (["--how=fry"], Fry()),
    (
      ["--how=fry:m", "--fat=butter", "--in=pan", "--minutes=9"],
      Fry(size="m", fat="butter", in_="pan", minutes=9),
    ),
  ],
)
def test_flags_become_a_dataclass(arguments, chosen):
  FLAGS.unparse_flags()
  for name in FLAGS:
    FLAGS[name].unparse()
  FLAGS(["x", *arguments])
  assert TABLE.chosen(FLAGS) == chosen


@pytest.mark.parametrize(
  "arguments, words, status",
  [
    ([], "--how: is missing", 1),
    (["--how=grill"], "expected one of boil, poach, fry, fry:s, fry:m", 1),
    (["--how=fry:"], "--how=fry:: expected one of", 1),
    (["--how=fry:x"], "--how=fry:x: expected one of", 1),
    (["--how=boil:s"], "--how=boil:s: expected one of", 1),
    (["--how=boil"], "--egg: is missing", 1),
    (
      ["--how=fry", "--salt"],
      "--salt: is for --how=boil, poach, found --how=fry; leave it out",
      1,
    ),
    (["--how=poach", "--minutes=5"], "--minutes: is for --how=boil, fry", 1),
    (
      ["--how=boil", "--egg=a", "--grams=1"],
      "--grams: has no effect with --salt=False",
      1,
    ),
    (["--how=fry", "--fat=lard"], "--fat=lard", 2),
    (["--how=boil", "--minutes=0"], "--minutes=0", 2),
  ],
)
def test_what_does_not_fit_is_refused(capsys, arguments, words, status):
  found, out, errors = call(capsys, *arguments)
  assert (found, out) == (status, "")
  assert words in errors


def test_help_follows_from_the_table(capsys):
  assert call(capsys, "--help")[0] == 0
  text = " ".join(cli.describe(main).split())
  assert "boil, poach: Cooks in water. It takes a while." in text
  assert "fry[:s|m]: Cooks in fat." in text
  assert "For boil: How long. By default 5. For fry: How long. By" in text
  assert "--[no]salt Whether with salt. Not for fry." in text
  assert "--fat=oil <oil|butter>: In what. For fry." in text
  assert sys.modules[__name__].__doc__ in text
