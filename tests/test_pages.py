"""The pages of the repository: what they tell people to type works.

Commands are parsed: their module, flags, values, run files and macros have to
exist; `test_readme_commands.py` runs those of the root's README. Blocks of
Python run, on a tiny model in place of a real one.
"""

import contextlib
import copy
import functools
import importlib
import importlib.util
import io
import pathlib
import re
import shlex

import pytest
from absl import flags

from research.interop.diffusion.spec import Spec
from research.interop.loaded import Loaded
from tests import support, test_rooms

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
FOLDERS = ("experiments", "kernels_pallas", "research")
PAGES = {
  path.relative_to(ROOT).as_posix(): path
  for path in (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(p for name in FOLDERS for p in sorted((ROOT / name).rglob("*.md"))),
  )
}
LENGTHS = {"README.md": 150}
"""Lines of a page at most; of other READMEs 200."""

OURS = r"python -m (experiments\.[\w.]+)"

PLACEHOLDER = re.compile(r"\b(?:[A-Z]+|FILE\.gguf|NAME\.gin)\b")
"""A word in capitals that a reader replaces."""


def _text(page: str) -> str:
  return PAGES[page].read_text("utf-8")


# Form ------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in PAGES if p.endswith("README.md")])
def test_a_readme_is_short(page):
  assert _text(page).count("\n") <= LENGTHS.get(page, 200)


SYSTEMS = (
  *(f"research/{x}" for x in ("lora", "quant", "diffusion", "vlm", "prm")),
  *(f"research/{x}" for x in ("search", "training", "data")),
  "kernels_pallas",
)


@pytest.mark.parametrize("folder", SYSTEMS)
def test_the_first_screen_of_a_system_has_what_a_newcomer_asks(folder):
  """A command to try, what it costs, what to expect, where the code is."""
  lines = _text(f"{folder}/README.md").splitlines()[:32]
  assert any(x.startswith("    python -m experiments.") for x in lines)
  for name in ("Cost", "Expect", "Code"):
    assert any(x.startswith(f"* **{name}:** ") for x in lines), name


def _anchors(path: pathlib.Path) -> set[str]:
  """Returns GitHub's anchors of a page's headings."""
  heads = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.M)
  plain = [re.sub(r"[^\w\- ]", "", head.lower()) for head in heads]
  return {head.replace(" ", "-") for head in plain}


def broken_links(path: pathlib.Path, text: str) -> list[str]:
  """Returns links of a page that lead nowhere in the repository."""
  out = []
  # Code has brackets, too.
  text = re.sub(r"`[^`\n]*`", lambda m: "" if "](" in m[0] else m[0], text)
  for link in re.findall(r"\]\(([^)\s]+)\)", text):
    file, _, anchor = link.partition("#")
    if file.startswith(("http:", "https:")):
      continue
    target = (path.parent / file).resolve() if file else path
    if not target.exists() or (anchor and anchor not in _anchors(target)):
      out.append(link)
  return out


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
  assert not broken_links(PAGES[page], _text(page))


def test_a_broken_link_is_found():
  text = "[a](README.md) [b](no.md) [c](README.md#systems) [d](README.md#no)"
  assert broken_links(ROOT / "x.md", text) == ["no.md", "README.md#no"]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page):
  """Those with a folder: from the root, from the page's, or from configs."""
  kinds = "py|gin|ipynb|cc|json"
  named = re.findall(rf"`((?:[\w-]+/)+[\w-]+\.(?:{kinds}))`", _text(page))
  folders = ("", "configs", "kernels_pallas", "research", "tests")
  homes = (PAGES[page].parent, *(ROOT / folder for folder in folders))
  missing = {
    name
    for name in named
    if not any((home / name).exists() for home in homes)
    and not PLACEHOLDER.search(name)
  }
  assert not missing


@pytest.mark.parametrize("page", [p for p in PAGES if p.endswith("/README.md")])
def test_modules_of_a_table_are_below_its_page(page):
  """Those that its first column names without a folder."""
  cells = re.findall(r"^\|([^|]*`[^|]*)\|", _text(page), re.M)
  named = re.findall(r"`([\w-]+\.py)`", " ".join(cells))
  below = {x.name for x in PAGES[page].parent.rglob("*.py")}
  assert not set(named) - below


def test_examples_of_what_one_file_adds_have_so_many_lines():
  rows = re.findall(
    r"^\|[^|]+\| `([\w/]+\.py)` \| (\d+) \|",
    _text("research/EXTENDING.md"),
    re.M,
  )
  assert len(rows) >= 8
  for name, lines in rows:
    found = (ROOT / name).read_text("utf-8").count("\n")
    assert abs(found - int(lines)) <= 0.1 * found, (name, found)


def test_the_picture_has_the_rooms_in_their_order():
  """Each name of the picture may import those above it."""
  picture = _text("README.md").split("```")[1]
  lines = [re.split(r"\s{3,}", x.strip())[0] for x in picture.splitlines()]
  names = re.findall(r"[a-z_]+", " ".join(lines))
  level = {
    room.rpartition(".")[2]: k
    for k, rooms in enumerate(test_rooms.ORDER)
    for room in rooms
  }
  levels = [level[name] for name in names]
  assert levels == sorted(levels)
  above_ground = {x for x, k in level.items() if k != test_rooms.GROUND}
  assert above_ground <= set(names)


# Commands --------------------------------------------------------------------


def commands(text: str) -> list[str]:
  """Returns what a page tells people to type, a line each.

  Those of code blocks, and those in line, whose optional parts stand in
  brackets.
  """
  text = re.sub(r"^```python\n.*?^```", "", text, flags=re.M | re.S)
  text = re.sub(
    r"^Today's tree does not rerun it\. `[^`]*`", "", text, flags=re.M
  )
  text = re.sub(r"\\\n\s*", " ", text)
  blocks = [x.strip() for x in re.findall(r"^(?: {4}|\t)(.*)$", text, re.M)]
  for fenced in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
    blocks += [x.strip() for x in fenced.splitlines()]
  # A table of an earlier tree has the command that made it, see `results`.
  inline = re.findall(r"(?<!rerun it\.\s)`((?:python|make)\s[^`]*)`", text)
  out = _unrolled(blocks) + [
    x if "[[" in x else re.sub(r"[\[\]]", "", x.replace("[--", " [--"))
    for x in inline
  ]
  out = [" ".join(x.split("&&")[0].split()) for x in out]
  pattern = r"[\w./-]*python |make "
  return [x for x in out if re.match(pattern, x)]


def _unrolled(lines: list[str]) -> list[str]:
  """Returns lines with those of a shell's loop once for each of its values."""
  out, loop = [], None
  for line in lines:
    if begin := re.fullmatch(r"for (\w+) in (.+); do", line):
      loop = begin[1], begin[2].split()
    elif line == "done":
      loop = None
    else:
      name, values = loop or ("", [""])
      spelled = rf"\${name}\b|\${{{name}}}"
      out += [re.sub(spelled, x, line) if name else line for x in values]
  return out


COMMANDS = sorted(
  {(page, line) for page in PAGES for line in commands(_text(page))}
)


@functools.cache
def _targets() -> set[str]:
  makefile = (ROOT / "Makefile").read_text("utf-8")
  return set(re.findall(r"^([a-z-]+):", makefile, re.M))


@functools.cache
def _macros(config: str) -> set[str]:
  """Returns the macros of a run file and of those that it includes."""
  text = (CONFIGS / config).read_text("utf-8")
  found = set(re.findall(r"^([A-Z_0-9]+) *=", text, re.M))
  for name in re.findall(r"^include '([^']+)'", text, re.M):
    found |= _macros(name)
  return found


def _check_run_file(name: str, changes: list[str]) -> None:
  """Checks the path of a --config, and the names of its --set."""
  if PLACEHOLDER.search(name):
    return
  assert (CONFIGS / name).is_file(), f"no {name} in configs"
  for change in changes:
    macro, equals, _ = change.partition("=")
    assert equals, f"--set={change}: has no value"
    if re.fullmatch(r"[A-Z_0-9]+", macro) and macro != "NAME":
      assert macro in _macros(name), f"{name} has no macro {macro}"


def _check_ours(module: str, words: list[str]) -> None:
  """Checks a command with absl's flags, and parses its values."""
  values = copy.deepcopy(importlib.import_module(module).FLAGS)
  kept = [x for x in words if not PLACEHOLDER.search(x.partition("=")[2])]
  for word in words:
    name = word.removeprefix("--").split("=")[0]
    assert name in values or name.removeprefix("no") in values, word
  values([module, *kept])


def _check_others(path: pathlib.Path, words: list[str]) -> None:
  """Checks that files beside a module define the flags, by their text."""
  texts = [p.read_text("utf-8") for p in path.parent.glob("*.py")]
  for word in [x.split("=")[0] for x in words if x.startswith("--")]:
    assert any(f'"{word}"' in text for text in texts), word


def _module(words: list[str]) -> tuple[str, pathlib.Path, list[str]]:
  """Returns a command's module, its file and its arguments."""
  if words[1] != "-m":
    return "", ROOT / words[1], words[2:]
  name = words[2]
  for path in (f"{name}.py", f"{name}/__main__.py"):
    found = ROOT / path.replace(".", "/", name.count("."))
    if found.exists():
      return name, found, words[3:]
  return name, ROOT / f"{name.replace('.', '/')}.py", words[3:]


def check(line: str) -> None:
  """Raises AssertionError or an error of flags for a command that is none."""
  words = shlex.split(line, comments=True)
  # Others' parsers take the value as the next word: it follows a flag.
  if words[0] == "make":
    targets = [x for x in words[1:] if "=" not in x]
    assert set(targets) <= _targets(), line
    return
  if words[1] == "-m" and words[2] in ("pytest", "ruff", "this"):
    return
  name, path, rest = _module(words)
  assert path.exists(), f"{line}: no {path}"
  if name.startswith("experiments."):
    given = [x.partition("=")[::2] for x in rest]
    changes = [value for flag, value in given if flag == "--set"]
    for flag, value in given:
      if flag in ("--config", "--sweep"):
        _check_run_file(value, changes)
    _check_ours(name, rest)
  else:
    _check_others(path, rest)


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_there(page):
  wrong = {}
  for line in [x for p, x in COMMANDS if p == page]:
    try:
      check(line)
    except (AssertionError, OSError, ValueError, flags.Error) as error:
      wrong[line] = str(error)
  assert not wrong


def test_there_are_commands():
  assert len(COMMANDS) > 80


@pytest.mark.parametrize(
  "line",
  [
    "make no-such-target",
    "python -m experiments.no_such",
    "python -m experiments.train --config=runs/no.gin --workdir=DIR",
    "python -m experiments.train --config=runs/quickstart.gin --no_such=1",
    "python -m experiments.train --config=runs/quickstart.gin --set=NO_SUCH=1",
    "python -m experiments.plan --config=runs/quickstart.gin --devices=x",
    "python -m kernels_pallas.inspect --no_such=v5e",
  ],
)
def test_a_wrong_command_is_found(line):
  with pytest.raises((AssertionError, flags.Error)):
    check(line)


def test_flags_in_line_are_some_command_s():
  """Those that a page names without their command."""
  files = [p for p in (ROOT / "experiments").glob("*.py") if p.stem[0] != "_"]
  modules = {f"experiments.{path.stem}" for path in files}
  modules |= {x for _, line in COMMANDS for x in re.findall(OURS, line)}
  known = {"help", "slow", "batch_size"}  # absl, pytest, LLaDA's scripts
  for module in modules:
    known |= set(getattr(importlib.import_module(module), "FLAGS", ()))
  for path in (ROOT / "kernels_pallas").rglob("*.py"):
    known |= set(re.findall(r'"--([\w-]+)"', path.read_text("utf-8")))
  for page in PAGES:
    found = set(re.findall(r"`--([\w-]+)", _text(page)))
    wrong = {x for x in found if not {x, x.removeprefix("no")} & known}
    assert not wrong, page


# Python ----------------------------------------------------------------------


def blocks(text: str) -> list[str]:
  """Returns the blocks of Python that nothing says are not to be run.

  `<!-- not run: REASON -->` stands before one that is not; the ten lines of the
  README have a test of their own.
  """
  text = re.sub(r"<!-- ten lines -->.*?<!-- end -->", "", text, flags=re.S)
  left_out = r"<!-- not run: .+? -->\n+```python\n.*?^```"
  text = re.sub(left_out, "", text, flags=re.M | re.S)
  return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


@functools.cache
def _tiny(name: str) -> Loaded:
  """Returns a model in place of the one that a page loads."""
  model = support.model("llama", width=64, hidden=64, head_dim=16, depth=2)
  spec = Spec(mask_id=66) if name == "DIR" else None
  return Loaded(model, support.params(model), None, {}, spec)


ELSEWHERE = {"research/README.md"}
"""Pages whose blocks run in a test of their own (`test_ten_lines.py`)."""

WITH_PYTHON = [p for p in PAGES if p not in ELSEWHERE and blocks(_text(p))]


def test_every_system_has_a_block():
  systems = ("research/lora", "research/quant", "research/diffusion")
  pages = [f"{x}/README.md" for x in (*systems, "kernels_pallas")]
  assert set(pages) <= set(WITH_PYTHON)


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_runs(page, monkeypatch):
  monkeypatch.setattr("research.interop.load_model", _tiny)
  names = {"__name__": "page"}
  for block in blocks(_text(page)):
    with contextlib.redirect_stdout(io.StringIO()):
      exec(compile(block, page, "exec"), names)  # noqa: S102


@pytest.mark.parametrize("page", PAGES)
def test_python_is_fenced(page):
  """What is indented is a command, a configuration, a text."""
  text = re.sub(r"^```.*?^```", "", _text(page), flags=re.M | re.S)
  code = r"^    (?:import |from (?!__gin__)\w+[\w.]* import|def |class |@\w)"
  assert not re.findall(code, text, re.M)
