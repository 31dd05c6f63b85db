"""What the commands that check claims share: flags, verdicts, a result.

Such a command reads a gin file that says what is compared, leaves its tables
and pictures in a folder, and ends with a verdict on each claim.
"""

import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from absl import flags

from experiments.core import cli

ALL = re.compile("")
"""Finds every name."""


class Verdict(NamedTuple):
  """A claim, what was found, and whether it holds."""

  claim: str
  found: str
  holds: bool


class Flags(NamedTuple):
  """--config, --workdir, --set and --only of a command."""

  config: flags.FlagHolder
  workdir: flags.FlagHolder
  set: flags.FlagHolder
  only: flags.FlagHolder | None

  def read(self, root: type) -> Any:
    """Returns what `config.read` does, both flags given and valid."""
    cli.required(config=self.config.value, workdir=self.workdir.value)
    cli.local(workdir=self.workdir.value)
    from experiments.core import config, runtime

    runtime.setup()
    return config.read(self.config.value, self.set.value, root=root)

  @property
  def wanted(self) -> re.Pattern[str]:
    """Returns what --only finds: names of arms or rows.

    Raises:
      UserError: it is no regular expression.
    """
    from research.typing import UserError

    try:
      return re.compile(self.only.value)
    except re.error as error:
      raise UserError(
        f"--only={self.only.value}: no regular expression ({error}); expected"
        " e.g. a name"
      ) from error

  @property
  def folder(self) -> pathlib.Path:
    """Returns where everything goes."""
    return pathlib.Path(self.workdir.value)

  @property
  def name(self) -> str:
    """Returns the configuration's name."""
    return pathlib.Path(self.config.value).stem


def define(
  values: flags.FlagValues, config: str, binding: str, only: str | None = None
) -> Flags:
  """Returns the flags, defined among `values`.

  Args:
    values: of the command.
    config: an example of a configuration.
    binding: an example of what --set takes, and why.
    only: an example of what --only takes; None: the command does not have it.
  """
  return Flags(
    flags.DEFINE_string(
      "config",
      None,
      f"Gin file, here or under configs/, e.g. {config}.",
      flag_values=values,
    ),
    flags.DEFINE_string(
      "workdir",
      None,
      "Where everything goes; made if missing.",
      flag_values=values,
    ),
    flags.DEFINE_multi_string(
      "set", [], f"Gin binding, e.g. --set={binding}.", flag_values=values
    ),
    only
    and flags.DEFINE_string(
      "only",
      "",
      "Regular expression: what it does not find is not run now, e.g."
      f" --only='{only}'.",
      flag_values=values,
    ),
  )


def claimed(folder: pathlib.Path, text: str) -> None:
  """Makes the folder, which belongs to this configuration alone.

  Args:
    folder: of a study.
    text: the configuration's.

  Raises:
    UserError: it is another configuration's.
  """
  from research.typing import UserError

  folder.mkdir(parents=True, exist_ok=True)
  note = folder / "config.gin"
  if note.exists() and note.read_text("utf-8") != text:
    raise UserError(
      f"{note}: differs from this configuration.\n"
      "Use another --workdir, or remove that one."
    )
  note.write_text(text)


class Kept(NamedTuple):
  """What was found of each arm of a study, a file each; what is there stays."""

  folder: pathlib.Path

  def path(self, arm: str) -> pathlib.Path:
    """Returns an arm's file, which need not be there."""
    return self.folder / (re.sub(r"[^\w.-]+", "_", arm) + ".json")

  def __contains__(self, arm: str) -> bool:
    return self.path(arm).exists()

  def __getitem__(self, arm: str) -> dict[str, Any]:
    return json.loads(self.path(arm).read_text("utf-8"))

  def keep(self, arm: str, row: Mapping[str, Any]) -> None:
    """Writes an arm's file, whole or not at all."""
    from research.io import folders

    self.folder.mkdir(parents=True, exist_ok=True)
    folders.write_text(self.path(arm), json.dumps(cli.plain(row)))


def tell(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
  """Prints verdicts; returns them as JSON has them."""
  found = list(verdicts)
  for claim, seen, holds in found:
    cli.say(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}\n  {seen}")
  return [v._asdict() for v in found]


def finish(folder: pathlib.Path, result: Mapping[str, Any]) -> dict[str, Any]:
  """Writes result.json into the folder; returns what it holds."""
  text = json.dumps(cli.plain(result), indent=2)
  (folder / "result.json").write_text(text + "\n")
  return dict(result)
