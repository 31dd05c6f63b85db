"""Counts lines outside tests, by folder: `make size`.

Code is every line that is neither blank, a comment, a docstring nor an import.
"""

import ast
import pathlib
import subprocess
from collections import Counter

ROOT = pathlib.Path(__file__).resolve().parents[1]


def spans(tree, kinds):
  """Yields the numbers of lines that statements of these kinds span."""
  for node in ast.walk(tree):
    if isinstance(node, kinds):
      yield from range(node.lineno, node.end_lineno + 1)


def docstrings(tree):
  """Yields the numbers of lines of docstrings, attributes' ones as well."""
  for node in ast.walk(tree):
    constant = isinstance(node, ast.Expr) and getattr(node.value, "value", None)
    if isinstance(constant, str):
      yield from range(node.lineno, node.end_lineno + 1)


def count(text):
  """Returns lines of a module by kind."""
  tree, lines = ast.parse(text), text.splitlines()
  docs = {*docstrings(tree)}
  imports = {*spans(tree, (ast.Import, ast.ImportFrom))}
  found = Counter(lines=len(lines))
  for number, line in enumerate(lines, 1):
    if number in docs:
      found["docstrings"] += 1
    elif line.strip() and not line.strip().startswith("#"):
      found["imports" if number in imports else "code"] += 1
  return found


def folders():
  """Returns counts by folder, two levels deep, of what git tracks."""
  listed = subprocess.run(
    ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True
  ).stdout.split()
  found = {}
  for name in listed:
    path = pathlib.PurePath(name)
    if path.parts[0] != "tests" and (ROOT / path).exists():
      folder = "/".join(path.parts[:-1][:2]) or "."
      found.setdefault(folder, Counter()).update(
        count((ROOT / path).read_text("utf-8")) | Counter(files=1)
      )
  return dict(sorted(found.items()))


def main():
  """Prints a table, rooms and their sum last."""
  found = folders()
  rooms = {}
  for folder, counts in found.items():
    room = folder.split("/")[0]
    rooms.setdefault(room, Counter()).update(counts)
  rooms["all"] = sum(rooms.values(), Counter())
  kinds = "files", "lines", "code", "docstrings", "imports"
  print(f"{'':32}", *(f"{kind:>10}" for kind in kinds))
  for name, counts in [*found.items(), *rooms.items()]:
    print(f"{name:32}", *(f"{counts[kind]:10,}" for kind in kinds))


if __name__ == "__main__":
  main()
