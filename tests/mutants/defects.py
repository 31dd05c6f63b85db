"""Defects that `run` plants: `rooms/ROOM.toml`, read and checked.

Each has a name, a kind, a file, `find`, which occurs there exactly once,
`replace`, and the test files that should notice it, the likeliest first. A
defect leaves code that runs, and changes what it computes.
"""

import ast
import dataclasses
import functools
import hashlib
import pathlib
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = pathlib.Path(__file__).parent / "rooms"


class StaleDefect(ValueError):
  """A defect that no longer fits its file; the message names both."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defect:
  """One defect.

  Attributes:
    room: name of the TOML file.
    name: unique; what goes wrong.
    kind: such as "wrong scale" or "off-by-one".
    file: path from the root of the repository.
    find: text that occurs once in the file.
    replace: what takes its place.
    tests: test files, as paths from the root.
  """

  room: str
  name: str
  kind: str
  file: str
  find: str
  replace: str
  tests: tuple[str, ...]

  @functools.cached_property
  def digest(self) -> str:
    """Changes with the defect, so that results of another one do not count."""
    parts = (self.file, self.find, self.replace)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

  def plant(self, root: pathlib.Path) -> str:
    """Returns the text of the file under `root` with the defect in it.

    Raises:
      StaleDefect: `find` is not there exactly once, nothing changes, or the
        result is not Python.
    """
    try:
      text = (root / self.file).read_text("utf-8")
    except OSError as error:
      raise StaleDefect(f"{self}: no such file; name the new one") from error
    count = text.count(self.find)
    if count != 1:
      raise StaleDefect(
        f"{self}: `find` occurs {count} times, expected once:\n{self.find}\n"
        "Adapt the defect to the file as it is now."
      )
    planted = text.replace(self.find, self.replace)
    if planted == text:
      raise StaleDefect(f"{self}: `replace` is `find`, expected a difference")
    if self.file.endswith(".py"):
      try:
        new = ast.parse(planted)
      except SyntaxError as error:
        raise StaleDefect(f"{self}: is not Python: {error}") from error
      if ast.dump(new) == ast.dump(ast.parse(text)):
        raise StaleDefect(f"{self}: changes no code, expected a difference")
    return planted

  def __str__(self) -> str:
    return f"{FOLDER.name}/{self.room}.toml: {self.name}: {self.file}"


def load() -> list[Defect]:
  """Returns all defects, room by room."""
  return [
    Defect(room=path.stem, **fields | {"tests": tuple(fields["tests"])})
    for path in sorted(FOLDER.glob("*.toml"))
    for fields in tomllib.loads(path.read_text("utf-8"))["defect"]
  ]
