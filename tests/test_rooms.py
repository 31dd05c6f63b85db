"""Which way the rooms lean, how large they are, and that no import is a circle.

Imports inside of functions count as well.
"""

import ast
import collections
import functools
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = "kernels_pallas", "research", "experiments"
ORDER = (  # what stands on a line may import what stands above it, and itself
  {"kernels_pallas"},
  {
    *("research.typing", "research.tree", "research.weights"),
    *("research.sharding", "research.io", "research.text", "research.taps"),
    *("research.moved", "research.tables", "research.progress"),
    *("research.errors", "research.rounding", "research.typechecks"),
    *("research.intervals", "research.ranges"),
  },
  {"research.nn"},
  {"research.generation", "research.data", "research.optim"},
  {"research.reasoning"},
  {"research.training"},
  {"research.quant"},
  {"research.lora"},
  {"research.diffusion"},
  {"research.vlm", "research.prm"},
  {"research.search"},
  {"research.interop"},
  {"research.planning"},
  {"experiments"},
)
GROUND = 1
"""The line whose rooms may import each other."""

MOST = 16
CATALOGUES = {  # a file a thing, all of one shape
  "research/lora/methods",
  "research/interop/vision/families",
  "research/vlm/images/tiling",
  "research/prm/formats",
  "research/reasoning/tasks",
  "kernels_pallas/flash_attention/gpu",
}


def _modules() -> dict[str, pathlib.Path]:
  found = {}
  for package in PACKAGES:
    for path in (ROOT / package).rglob("*.py"):
      parts = path.relative_to(ROOT).with_suffix("").parts
      found[".".join(parts).removesuffix(".__init__")] = path
  return found


@functools.cache
def _imports() -> dict[str, set[str]]:
  """Returns which of our modules each of them imports."""
  modules, found = _modules(), collections.defaultdict(set)
  for name, path in modules.items():
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
      if isinstance(node, ast.Import):
        said = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        said = [x if x in modules else node.module for x in inner]
      else:
        continue
      # A package's names are those of its modules: see `_inits`.
      found[name] |= {x for x in said if x in modules and x != name}
  return found


def _room(module: str) -> tuple[int, str]:
  for line, rooms in enumerate(ORDER):
    for room in rooms:
      if module == room or module.startswith(room + "."):
        return line, room
  raise AssertionError(f"{module} is in no room: add it to ORDER")


def test_no_import_leans_upward():
  upward = []
  for module, imported in _imports().items():
    if module in PACKAGES:
      continue
    line, room = _room(module)
    for other in imported - set(PACKAGES):
      above, theirs = _room(other)
      beside = above == line and theirs != room and line != GROUND
      if above > line or beside:
        upward.append(f"{module} imports {other}")
  assert not upward, "\n".join(sorted(upward))


def _circles(edges: dict[str, set[str]]) -> list[str]:
  """Returns a way round for each module that reaches itself."""
  done, way, found = set(), [], []

  def visit(module):
    if module in way:
      found.append(" > ".join([*way[way.index(module) :], module]))
    elif module not in done:
      way.append(module)
      for other in sorted(edges.get(module, ())):
        visit(other)
      way.pop()
      done.add(module)

  for module in sorted(edges):
    visit(module)
  return found


def test_no_imports_are_a_circle():
  packages = {m for m, path in _modules().items() if path.stem == "__init__"}
  edges = {
    module: imported - packages
    for module, imported in _imports().items()
    if module not in packages
  }
  assert not _circles(edges)
  assert _circles({"a": {"b"}, "b": {"c"}, "c": {"a"}})


def test_rooms_have_room():
  sizes = collections.Counter(
    str(path.parent.relative_to(ROOT))
    for path in _modules().values()
    if path.stem != "__init__"
  )
  crowded = {
    folder: n
    for folder, n in sizes.items()
    if n > MOST and folder not in CATALOGUES
  }
  assert not crowded
