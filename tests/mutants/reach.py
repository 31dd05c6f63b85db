"""Which test files may notice a change of a module.

A file reaches the modules that it imports, inside of functions too, and those
that it names in a text, as a command line or gin does; the names of a package
stand for the modules that its table of contents takes them from. A gin file
that is named by its path reaches what it imports and includes.
"""

import ast
import functools
import pathlib
import re
from collections.abc import Iterator, Sequence

from tests.mutants.defects import ROOT

PACKAGES = "kernels_pallas", "research", "experiments", "tests"
_NAME = re.compile(rf"\b(?:{'|'.join(PACKAGES)})(?:\.\w+)+")
_GIN = re.compile(r"[\w./-]+\.gin")


class Reach:
  """The files of a tree, and which of them each one names."""

  def __init__(self, root: pathlib.Path = ROOT):
    """Reads all Python and gin files under `root`."""
    self.root = root
    self._files: dict[str, str] = {}  # module or gin path -> file
    for package in PACKAGES:
      for path in (root / package).rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        self._files[name] = path.relative_to(root).as_posix()
    for path in (root / "configs").rglob("*.gin"):
      name = path.relative_to(root / "configs").as_posix()
      self._files[name] = path.relative_to(root).as_posix()
    self._users: dict[str, set[str]] = {}  # file -> those that name it
    for source in self._files.values():
      for target in self._named_in(source):
        self._users.setdefault(target, set()).add(source)

  def tests_of(self, file: str) -> list[str]:
    """Returns the test files that reach a file, nearest first.

    Args:
      file: path from the root. What is no Python file counts as the modules of
        its folder, which compile it.
    """
    targets = {file}
    if not file.endswith(".py"):
      folder = file.rpartition("/")[0]
      files = self._files.values()
      targets = {x for x in files if x.rpartition("/")[0] == folder}
    found, near = dict.fromkeys(targets), sorted(targets)
    while near:
      users = set().union(*(self._users.get(x, ()) for x in near))
      near = sorted(users - found.keys())
      found |= dict.fromkeys(near)
    return [
      x
      for x in found
      if x.rpartition("/")[2].startswith("test_") and x.startswith("tests/")
    ]

  def _named_in(self, file: str) -> Iterator[str]:
    """Yields the files that a file names."""
    text = (self.root / file).read_text("utf-8")
    if file.endswith(".gin"):
      named = {*_NAME.findall(text), *_GIN.findall(text)}
    else:
      tree = ast.parse(text)
      named = {*_imported(tree), *_texts(tree, file.startswith("tests/"))}
    if file.endswith("__init__.py") and "pkgutil" in text:
      folder = file.rpartition("/")[0]  # imports whatever lies there
      yield from (x for x in self._files.values() if x.startswith(folder))
    for name in named:
      if name.endswith(".gin") and name in self._files:
        yield self._files[name]
      else:
        yield from self._modules(name)
    if file.startswith("tests/"):
      for parent in pathlib.PurePosixPath(file).parents:
        if (conftest := f"{parent}/conftest.py") in self._files.values():
          yield conftest

  def _modules(self, name: str) -> Iterator[str]:
    """Yields the files that a dotted name stands for."""
    parts = name.split(".")
    for size in range(1, len(parts) + 1):
      file = self._files.get(package := ".".join(parts[:size]))
      if file is None:
        continue
      yield file
      if size == len(parts) or f"{package}.{parts[size]}" not in self._files:
        yield from self._lazy(package, file, parts[size : size + 1])

  def _lazy(self, package: str, file: str, names: list[str]) -> Iterator[str]:
    """Yields what a package's table of contents takes names from."""
    if not file.endswith("__init__.py"):
      return
    for submodule, public in _table(self.root / file):
      if not names or names[0] in public:
        yield self._files[f"{package}.{submodule}"]


def _imported(tree: ast.Module) -> Iterator[str]:
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _texts(tree: ast.Module, parts: bool) -> Iterator[str]:
  """Yields modules and gin paths that are texts; with `parts`, in texts."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      for pattern in (_NAME, _GIN):
        found = pattern.findall(node.value)
        yield from found if parts else (x for x in found if x == node.value)


@functools.lru_cache(maxsize=256)
def _table(path: pathlib.Path) -> Sequence[tuple[str, Sequence[str]]]:
  """Returns (submodule, names) of a package's `lazy_loader.attach`."""
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    if isinstance(node, ast.keyword) and node.arg == "submod_attrs":
      return tuple(ast.literal_eval(node.value).items())
  return ()
