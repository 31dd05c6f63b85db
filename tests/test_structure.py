"""The promises of the design that a syntax tree can check.

Each rule returns its violations as text, so that a failure names every place;
`test_the_rules_can_fail` shows each rule a file that breaks it.
"""

import ast
import collections
import configparser
import functools
import pathlib
import re
import sys
from collections.abc import Iterator, Set

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("research", "kernels_pallas", "experiments")
LAYERS = {  # package -> our packages that it may import
  "kernels_pallas": {"kernels_pallas"},
  "research": {"research", "kernels_pallas"},
  "experiments": {"research", "kernels_pallas", "experiments"},
}
MAX_LINES = 500
MAX_RUN_LINES, MAX_STUDY_LINES = 40, 110  # a study lists steps and claims
RUN_HEADER = ("Claim:", "Run:", "Cost:", "Expect:")

Source = tuple[str, str]  # path relative to the root, text


@functools.cache
def _tree(text: str) -> ast.Module:
  return ast.parse(text)


@functools.cache
def _sources() -> list[Source]:
  return [
    (str(path.relative_to(ROOT)), path.read_text("utf-8"))
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
  ]


def _imports(path: str, text: str) -> set[str]:
  """Returns the dotted names that a file imports, relative ones resolved."""
  names = set()
  for node in ast.walk(_tree(text)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = ""
      if node.level:
        # A package's __init__ counts as a level of its own, as in Python.
        base = ".".join(pathlib.PurePath(path).parts[: -node.level])
      module = ".".join(part for part in (base, node.module) if part)
      names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
  return names


def _imports_any(path: str, text: str, *modules: str) -> set[str]:
  return {
    name
    for name in _imports(path, text)
    for module in modules
    if name == module or name.startswith(module + ".")
  }


def dependency_direction(path: str, text: str) -> list[str]:
  """kernels_pallas <- research <- experiments, never backwards."""
  forbidden = (set(PACKAGES) | {"tests"}) - LAYERS[path.split("/")[0]]
  return sorted(_imports_any(path, text, *forbidden))


def gin_in_one_file(path: str, text: str) -> list[str]:
  if path == "experiments/core/config.py":
    return []
  return sorted(_imports_any(path, text, "gin", "__gin__"))


def flags_in_experiments(path: str, text: str) -> list[str]:
  if path.startswith("experiments/"):
    return []
  return sorted(_imports_any(path, text, "absl.flags", "absl.app"))


def orbax_in_one_file(path: str, text: str) -> list[str]:
  if path == "research/training/checkpoints/checkpoint.py":
    return []
  return sorted(_imports_any(path, text, "orbax"))


def grain_in_data(path: str, text: str) -> list[str]:
  if path.startswith("research/data/"):
    return []
  return sorted(_imports_any(path, text, "grain"))


def no_other_framework(path: str, text: str) -> list[str]:
  heavy = ("torch", "tensorflow", "transformers", "peft", "clu", "pickle")
  return sorted(_imports_any(path, text, *heavy))


def leaf_types_stay_home(path: str, text: str) -> list[str]:
  """Only a leaf's own system and weights.py may ask for a leaf's class."""
  homes = {
    "AdaptedTensor": ("research/lora/", "research/interop/peft/"),
    "QTensor": ("research/quant/", "research/interop/quantized/"),
  }
  found = []
  for node in ast.walk(_tree(text)):
    if not (
      isinstance(node, ast.Call)
      and isinstance(node.func, ast.Name)
      and node.func.id in ("isinstance", "issubclass")
      and len(node.args) == 2
    ):
      continue
    asked = {
      name.id if isinstance(name, ast.Name) else name.attr
      for name in ast.walk(node.args[1])
      if isinstance(name, ast.Name | ast.Attribute)
    }
    found += [
      f"line {node.lineno}: {ast.unparse(node)}"
      for leaf, home in homes.items()
      if leaf in asked
      and not path.startswith(home)
      and path != "research/weights.py"
    ]
  return found


def training_knows_no_method(path: str, text: str) -> list[str]:
  """The trainer mentions no adapter and no quantizer, imports included."""
  if not path.startswith("research/training/"):
    return []
  systems = "research.lora", "research.quant", "research.diffusion"
  found = sorted(_imports_any(path, text, *systems))
  methods = re.compile(r"lora|dora|pissa|qlora|qtensor|gptq|awq|nf4", re.I)
  for node in ast.walk(_tree(text)):
    name = getattr(node, "id", None) or getattr(node, "attr", None)
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.arg):
      name = getattr(node, "name", None) or getattr(node, "arg", None)
    if isinstance(name, str) and methods.search(name):
      found.append(f"line {node.lineno}: {name}")
  return found


def files_are_short(path: str, text: str) -> list[str]:
  lines = text.count("\n")
  return [f"{lines} lines"] if lines > MAX_LINES else []


def public_names_are_documented(path: str, text: str) -> list[str]:
  """Modules, public functions and classes say what they are for."""
  tree = _tree(text)
  found = []
  if text.strip() and not ast.get_docstring(tree):
    found.append("module")
  found += [
    f"line {node.lineno}: {node.name}"
    for node in tree.body
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
    and not node.name.startswith("_")
    and not ast.get_docstring(node)
  ]
  return found


def modules_hold_no_arrays(path: str, text: str) -> list[str]:
  """A Linen module has hyper-parameters as fields and no array among them.

  Nor does it keep state between calls: no `self.x = ...` (Linen's `setup` is
  not used), no interception, no variables made on the side.
  """
  array = re.compile(r"\b(Array|ndarray|Float\d*|Int\d*|UInt8|Bool|Params)\b")
  found = []
  for node in ast.walk(_tree(text)):
    if isinstance(node, ast.ClassDef) and any(
      ast.unparse(base) in ("nn.Module", "linen.Module") for base in node.bases
    ):
      found += [
        f"line {field.lineno}: {node.name}.{ast.unparse(field)}"
        for field in node.body
        if isinstance(field, ast.AnnAssign)
        and array.search(ast.unparse(field.annotation).split("Callable")[0])
      ]
      found += [
        f"line {inner.lineno}: {ast.unparse(inner)}"
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute)
        and isinstance(inner.ctx, ast.Store)
        and ast.unparse(inner.value) == "self"
      ]
    if isinstance(node, ast.Attribute) and node.attr == "intercept_methods":
      found.append(f"line {node.lineno}: {ast.unparse(node)}")
  return found


def dataclasses_are_frozen(path: str, text: str) -> list[str]:
  found = []
  for node in ast.walk(_tree(text)):
    for decorator in getattr(node, "decorator_list", []):
      name = ast.unparse(decorator)
      if re.match(r"(dataclasses\.)?dataclass\b", name) and (
        "frozen=True" not in name
      ):
        found.append(f"line {node.lineno}: {node.name}")
  return found


def no_mutable_globals(path: str, text: str) -> list[str]:
  """No `global`, and no empty container at module level to be filled later."""
  tree = _tree(text)
  found = [
    f"line {node.lineno}: {ast.unparse(node)}"
    for node in ast.walk(tree)
    if isinstance(node, ast.Global)
  ]
  for node in tree.body:
    value = getattr(node, "value", None)
    if isinstance(node, ast.Assign | ast.AnnAssign) and (
      (isinstance(value, ast.List | ast.Set) and not value.elts)
      or (isinstance(value, ast.Dict) and not value.keys)
      or (value is not None and ast.unparse(value) in ("dict()", "list()"))
    ):
      found.append(f"line {node.lineno}: {ast.unparse(node)}")
  return found


RULES = {  # rule -> a (path, text) that breaks it
  dependency_direction: (
    "kernels_pallas/masks/masks.py",
    '"""M."""\nfrom research import typing\n',
  ),
  gin_in_one_file: ("research/a.py", '"""M."""\nimport gin\n'),
  flags_in_experiments: ("research/a.py", '"""M."""\nfrom absl import flags\n'),
  orbax_in_one_file: (
    "research/training/loop.py",
    '"""M."""\nfrom orbax.checkpoint import v1 as ocp\n',
  ),
  grain_in_data: ("experiments/train.py", '"""M."""\nimport grain\n'),
  no_other_framework: ("research/a.py", '"""M."""\nimport torch.nn\n'),
  leaf_types_stay_home: (
    "research/nn/a.py",
    '"""M."""\nx = isinstance(w, (int, tensor.AdaptedTensor))\n',
  ),
  training_knows_no_method: (
    "research/training/a.py",
    '"""M."""\nuse_dora = 1\n',
  ),
  files_are_short: ("research/a.py", '"""M."""\n' + "\n" * MAX_LINES),
  public_names_are_documented: (
    "research/a.py",
    '"""M."""\ndef f():\n  return 1\n',
  ),
  modules_hold_no_arrays: (
    "research/nn/a.py",
    '"""M."""\nclass A(nn.Module):\n  """A."""\n  w: jax.Array\n',
  ),
  dataclasses_are_frozen: (
    "research/a.py",
    '"""M."""\n@dataclasses.dataclass\nclass A:\n  """A."""\n  w: int\n',
  ),
  no_mutable_globals: ("research/a.py", '"""M."""\nREGISTRY = {}\n'),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_our_code_keeps(rule):
  broken = {
    path: found for path, text in _sources() if (found := rule(path, text))
  }
  assert not broken, broken


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rules_can_fail(rule):
  """Each example breaks its own rule and none of the others."""
  path, text = RULES[rule]
  assert [other for other in RULES if other(path, text)] == [rule]


def _left_out(path: str, text: str) -> list[str]:
  """Returns what leaves out tests of a file that only reads our sources.

  Such a file imports nothing that computes or starts a process, so that all of
  its tests are cheap.
  """
  names = {
    name.split(".")[0]
    for name in _imports(path, text)
    if name != "tests" and not name.startswith("tests.mutants")
  }
  names -= {*sys.stdlib_module_names, "pytest"} - {"subprocess"}
  if names:
    return []
  return [
    f"line {node.lineno}: {ast.unparse(node)}"
    for node in ast.walk(_tree(text))
    if isinstance(node, ast.Attribute)
    and node.attr in ("slow", "sample", "cover")
    and ast.unparse(node.value).endswith("mark")
  ]


def test_tests_of_sources_always_run():
  """`make test` leaves out no rule: one that is not run is not kept."""
  tests = sorted((ROOT / "tests").rglob("test_*.py"))
  broken = {
    str(path.relative_to(ROOT)): left_out
    for path in tests
    if (left_out := _left_out(str(path), path.read_text("utf-8")))
  }
  assert not broken, broken
  marked = "import pytest\n@pytest.mark.sample(4)\ndef test_a(): pass\n"
  assert _left_out("tests/test_a.py", marked)
  assert not _left_out("tests/test_a.py", "import jax\n" + marked)


def test_relative_imports_are_resolved():
  found = _imports("research/nn/a.py", "from .. import lora\nfrom . import b")
  assert {"research.lora", "research.nn.b"} <= found
  assert dependency_direction("kernels_pallas/a.py", "from research import x")


def _unreached(sources: list[Source], words: set[str]) -> list[str]:
  """Returns the modules that no other one imports and no word names.

  Of modules of one name the words say which, with its folder.
  """
  imported = {name for source in sources for name in _imports(*source)}
  # Tables name modules in strings, a package's contents without the package.
  for path, text in sources:
    imported |= {*re.findall(r'"(\w+(?:\.\w+)+)"', text)}
    if path.endswith("__init__.py"):
      inside, folder = {*re.findall(r"\w+", text)}, path.split("/")[-2]
      words = words | inside | {f"{folder}.{word}" for word in inside}
  modules = [pathlib.PurePath(path).with_suffix("") for path, _ in sources]
  count = collections.Counter(module.name for module in modules)
  return [
    str(module)
    for module in modules
    if ".".join(module.parts) not in imported
    and module.name not in ("__init__", "__main__")
    and ".".join(module.parts[-1 if count[module.name] == 1 else -2 :])
    not in words
  ]


def _words(text: str) -> set[str]:
  """Returns the words of a text, and pairs that a dot or a slash joins."""
  text = re.sub(r"from ([\w.]+) import (\w+)", r"\1.\2", text)
  pairs = re.findall(r"(?=\b(\w+)[./](\w+))", text)
  return {*re.findall(r"\w+", text), *map(".".join, pairs)}


def _texts(*patterns: str) -> Iterator[pathlib.Path]:
  """Yields files that say what is used: run files, notebooks and pages."""
  for folder in (*PACKAGES, "configs", "colab"):
    for pattern in patterns:
      yield from (ROOT / folder).rglob(pattern)


def test_every_module_is_reached():
  """By another one, its package's contents, a run file, notebook or page."""
  words = _words((ROOT / "Makefile").read_text("utf-8"))
  for path in _texts("*.gin", "*.ipynb", "*.md"):
    words |= _words(path.read_text("utf-8"))
  assert not _unreached(_sources(), words)
  example = [("research/a.py", ""), ("research/b.py", "import research.a\n")]
  assert _unreached(example, set()) == ["research/b"]
  assert not _unreached(example, {"b"})
  example.append(("research/c/b.py", ""))
  assert _unreached(example, _words("import c.b")) == ["research/b"]


_USED_ELSEWHERE = {
  # Values that a user's run file or program may name, as others of their kind.
  *("Recall", "mask_overlong", "min_to_go", "over_tokens"),
  # Called by libraries: ast.NodeVisitor, yaml, lm_eval.
  *("visit_ClassDef", "visit_Concat", "visit_FunctionDef"),
  *("ignore_aliases", "loglikelihood_rolling"),
}


def _unused(texts: list[str], others: Set[str]) -> set[str]:
  """Returns public functions and classes that nothing but a test names."""
  words = collections.Counter(w for x in texts for w in re.findall(r"\w+", x))
  definition = re.compile(r"^ *(?:def|class) ([A-Za-z]\w*)", re.MULTILINE)
  names = {name for text in texts for name in definition.findall(text)}
  return {name for name in names if words[name] == 1} - others


def test_no_function_is_there_for_its_test_alone():
  others = set(_USED_ELSEWHERE)
  for path in (ROOT / "README.md", *_texts("*.gin", "*.ipynb", "*.md")):
    others |= {*re.findall(r"\w+", path.read_text("utf-8"))}
  assert not _unused([text for _, text in _sources()], others)
  example = ["def a(): b()\nclass C:\n  def d(self): pass\n", "def b(): C"]
  assert _unused(example, {"a"}) == {"d"}


def test_top_level_holds_only_what_the_design_names():
  allowed = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"}
  allowed |= {"Makefile", "setup.cfg", "pyproject.toml", ".git", ".gitignore"}
  allowed |= {".github", ".ci", "configs", "tests", "colab", *PACKAGES}
  ignored = [
    line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()
  ]
  extra = {
    path.name
    for path in ROOT.iterdir()
    if path.name not in allowed
    and not any(path.match(pattern) for pattern in ignored)
  }
  assert not extra


def _requirements() -> list[str]:
  return [line for lines in _extras().values() for line in lines]


def _extras() -> dict[str, list[str]]:
  """Returns the requirements of each extra; those of "" all users install."""
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg")
  texts = {"": config["options"]["install_requires"]}
  texts |= config["options.extras_require"]
  return {
    extra: [line for line in text.split("\n") if line.strip()]
    for extra, text in texts.items()
  }


def test_every_dependency_is_bounded_on_both_sides():
  assert len(_requirements()) > 20
  loose = [
    line
    for line in _requirements()
    if not re.fullmatch(r"[\w\[\]-]+>=[\d.]+,<[\d.]+", line)
  ]
  assert not loose


def _distributions(lines: list[str]) -> set[str]:
  """Returns the names in a requirement list, in pip's normal form."""
  return {
    re.split(r"[\[<>=~! ]", line.strip())[0].lower().replace("_", "-")
    for line in lines
  }


DISTRIBUTIONS = {
  "absl": "absl-py",
  "gin": "gin-config",
  "orbax": "orbax-checkpoint",
  "PIL": "pillow",
  "yaml": "pyyaml",
  "jaxlib": "jax",  # pins it
}
"""What brings a package, where it is not called after it."""


def _imported(path: str, text: str) -> set[str]:
  """Returns the distributions, not ours, that a file imports anywhere."""
  names = {name.split(".")[0] for name in _imports(path, text)}
  names -= {*sys.stdlib_module_names, *PACKAGES}
  return _distributions([DISTRIBUTIONS.get(name, name) for name in names])


def _imported_at_once(path: str, text: str) -> set[str]:
  """Returns those that a file needs to be imported itself."""
  kept, rest = [], [_tree(text)]
  while rest:
    node = rest.pop()
    if isinstance(node, ast.Import | ast.ImportFrom):
      kept.append(ast.unparse(node))
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      rest += ast.iter_child_nodes(node)
  return _imported(path, "\n".join(kept))


def test_every_import_is_declared():
  """What our code imports is the standard library, ours, or in setup.cfg."""
  # Optional ones are imported inside functions, behind a clear error.
  optional = {"huggingface-hub", "tokamax", "flash-attn-jax"}
  known = _distributions(_requirements()) | optional
  missing = {
    path: found
    for path, text in _sources()
    if (found := _imported(path, text) - known)
  }
  assert not missing


def test_users_install_all_that_is_imported_and_no_more():
  """What only tests import is of the extra `dev`, an option of its own."""
  installed, imported = _distributions(_extras()[""]), set()
  for path, text in _sources():
    imported |= _imported(path, text)
    assert _imported_at_once(path, text) <= installed, path
  assert installed <= imported, installed - imported


def test_imports_inside_of_functions_are_told_apart():
  text = "import numpy\ndef f():\n  import wandb\n"
  assert _imported("research/a.py", text) == {"numpy", "wandb"}
  assert _imported_at_once("research/a.py", text) == {"numpy"}


def test_extras_are_named_as_they_can_be_installed():
  """Heptad is in no package index: an extra is installed from its folder."""
  named = []
  for path, text in _sources():
    for form, extra in re.findall(r"install (.{1,12}?)\[(\w[\w-]*)\]", text):
      if form != "'jax":
        assert (form, extra in _extras()) == ("-e '.", True), path
        named.append(extra)
  assert {"tracking", "gcs", "evaluation"} <= set(named)


def _run_files() -> list[pathlib.Path]:
  return sorted((ROOT / "configs" / "runs").rglob("*.gin"))


def _faults_of_run_file(text: str) -> list[str]:
  lines = text.splitlines()
  header = "\n".join(
    lines[
      : next(
        (i for i, line in enumerate(lines) if not line.startswith("#")),
        len(lines),
      )
    ]
  )
  faults = [f"no '{field}'" for field in RUN_HEADER if field not in header]
  most = MAX_STUDY_LINES if "pipeline.Pipeline" in text else MAX_RUN_LINES
  if len(lines) > most:
    faults.append(f"{len(lines)} lines, more than {most}")
  return faults


def test_run_files_are_short_and_say_what_they_claim():
  faults = {
    str(path.relative_to(ROOT)): found
    for path in _run_files()
    if (found := _faults_of_run_file(path.read_text("utf-8")))
  }
  assert not faults
  good = "# Claim: a\n# Run: b\n# Cost: c\n# Expect: d\n"
  assert not _faults_of_run_file(good)
  assert _faults_of_run_file(good.replace("Cost", "cost"))
  assert _faults_of_run_file("import a\n" + good)
  assert _faults_of_run_file(good + "x = 1\n" * MAX_RUN_LINES)


def test_nothing_names_this_machine_or_a_registry():
  """The repository works wherever pip does, so it names no host of one."""
  words = re.compile(
    r"/work/|pypi\.org|files\.pythonhosted|/root/|/tmp/|/home/"
  )
  here = pathlib.Path(__file__)
  checked = [*(ROOT / ".ci").iterdir(), *ROOT.glob("*.md")]
  checked += [ROOT / "Makefile", ROOT / "setup.cfg"]
  for package in (*PACKAGES, "configs", "tests"):
    checked += [
      path
      for pattern in ("*.py", "*.gin", "*.txt", "*.md")
      for path in (ROOT / package).rglob(pattern)
    ]
  found = {
    str(path.relative_to(ROOT)): match.group()
    for path in checked
    if path != here
    and (match := words.search(path.read_text("utf-8", "replace")))
  }
  assert not found
