"""Every module is reached from what users run, configure or read about."""

import ast
import functools
import re

from tests.test_contents import ROOT

ROOMS = "research", "experiments", "kernels_pallas"
NAME = re.compile(r"\b(?:research|experiments|kernels_pallas)(?:\.\w+)+")
FROM = re.compile(r"from ([\w.]+) import ([\w, ]+)")
MODULES = {
  ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(
    ".__init__"
  ): path
  for room in ROOMS
  for path in (ROOT / room).rglob("*.py")
}
PACKAGES = {
  name: path for name, path in MODULES.items() if path.name == "__init__.py"
}
PAGES = [p for room in ROOMS for p in (ROOT / room).rglob("*.md")]


def roots():
  """Yields what commands, run files, notebooks and pages name."""
  yield from (
    f"experiments.{p.stem}" for p in (ROOT / "experiments").glob("*.py")
  )
  files = [
    *(ROOT / "configs").rglob("*.gin"),
    *(ROOT / "colab").glob("*.ipynb"),
  ]
  for path in [*files, *PAGES, *ROOT.glob("*.md"), ROOT / "Makefile"]:
    text = path.read_text("utf-8")
    yield from NAME.findall(text)
    for package, names in FROM.findall(text):
      yield from (
        f"{package}.{name.split()[0]}"
        for name in names.split(",")
        if name.strip()
      )


def documented():
  """Yields what pages have as code: names of packages, `module.function`.

  Functions count on pages of their system alone.
  """
  pages = {page: _code(page) for page in [*PAGES, *ROOT.glob("*.md")]}
  for package, path in PACKAGES.items():
    near, stems = path.parent.parent, {x.stem for x in path.parent.glob("*.py")}
    for page, words in pages.items():
      for word in words:
        module, _, _ = word.partition(".")
        close = page.is_relative_to(near)
        if word in lazy(package) and (word[0].isupper() or close):
          yield f"{package}.{word}"
        elif module != word and module in stems and close:
          yield f"{package}.{module}"


def _code(page):
  spans = re.findall(r"`([^`\n]+)`", page.read_text("utf-8"))
  text = " ".join(spans)
  return {*re.findall(r"\w+", text), *re.findall(r"\w+\.\w+", text)}


def imports(path):
  """Yields what a module imports, and what it takes of packages."""
  text = path.read_text("utf-8")
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Import | ast.ImportFrom):
      package = getattr(node, "module", None)
      for alias in node.names:
        name = f"{package}.{alias.name}" if package else alias.name
        yield name
        called = re.escape(alias.asname or alias.name)
        for attribute in re.findall(rf"\b{called}\.(\w+)", text):
          yield f"{name}.{attribute}"
  yield from NAME.findall(text)


@functools.cache
def lazy(package):
  """Returns the modules of a package's names that are imported late."""
  text = MODULES[package].read_text("utf-8")
  table = re.search(r"submod_attrs=(\{.*?\n  \})", text, re.S)
  named = ast.literal_eval(table[1]) if table else {}
  return {x: f"{package}.{m}" for m, names in named.items() for x in names}


def reached():
  """Returns the names of the modules that are reached."""
  found, left = set(), [*roots(), *documented()]
  while left:
    name, attributes = left.pop(), []
    while name and name not in MODULES:
      name, _, attribute = name.rpartition(".")
      attributes.append(attribute)
    if not name:
      continue
    if attributes and (module := lazy(name).get(attributes[-1])):
      left.append(module)
    if name not in found:
      found.add(name)
      left += imports(MODULES[name])
  return found


def test_every_module_is_reached():
  missing = {*MODULES} - {*PACKAGES} - reached()
  assert sorted(missing) == [], "reach it from a page, or delete it"
