"""A study's result: where it comes from, as JSON, and in pages.

A result is stored beside its run file, that of `runs/lora/NAME.gin` in
`configs/runs/lora/results/NAME.json`. A page shows one of its tables between
two lines,

  <!-- results: runs/lora/NAME.json TABLE -->
  <!-- end -->

with TABLE its number, from 0, or `verdicts` for what became of its claims.
`render_pages` writes what stands between them: the table, and a line that says
where it comes from. It draws a table as bars into FILE, beside the page, where
a line says so:

  <!-- bars: runs/lora/NAME.json TABLE FILE.svg -->

In a table below `<!-- claims -->`, whose lines name a run file and the first
words of one of its claims, it writes what was found for each.
"""

import json
import os
import pathlib
import platform
import re
import subprocess
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.core import cli, stats
from experiments.core.config import CONFIGS
from experiments.studies import page_bars
from experiments.studies.protocol import Lines
from research import tables
from research.typing import UserError

ROOT = CONFIGS.parent
ROOMS = "colab", "configs", "experiments", "kernels_pallas", "research"
LIBRARIES = "python", "jax", "jaxlib", "flax", "optax", "numpy"

_BLOCK = re.compile(
  r"^(<!-- results: (?P<path>\S+\.json) (?P<table>\d+|verdicts) -->)$.*?"
  r"^(?P<end><!-- end -->)$",
  re.M | re.S,
)
_BARS = re.compile(
  r"^<!-- bars: (?P<path>\S+\.json) (?P<table>\d+) (?P<file>[\w-]+\.svg) -->$",
  re.M,
)
_CLAIMS = re.compile(
  r"(?<=^<!-- claims -->\n)(?P<head>\|.*\n\|[-| ]+\n)(?P<lines>(?:\|.*\n)+)",
  re.M,
)


def commit() -> str | None:
  """Returns the commit of this checkout, with `+` if it has changes.

  None where there is no git repository.
  """
  found = _git("rev-parse", "HEAD")
  changes = _git("status", "--porcelain", "--untracked-files=no")
  return found and found + ("+" if changes else "")


def _git(*arguments: str) -> str | None:
  try:
    done = subprocess.run(
      ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True
    )
  except OSError:  # no git
    return None
  return done.stdout.strip() if done.returncode == 0 else None


def machine() -> str:
  """Returns this machine in words: cores, processor, JAX's devices."""
  import jax

  name = platform.processor() or platform.machine()
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text()
    name = dict(re.findall(r"^(.+?)\s*:\s*(.*)$", text, re.M))["model name"]
  except (OSError, KeyError):
    pass
  devices = jax.devices()
  return (
    f"{len(os.sched_getaffinity(0))} cores of {name}; {len(devices)} x"
    f" {devices[0].device_kind}"
  )


def versions() -> dict[str, str]:
  """Returns the versions of what numbers depend on most."""
  from research.training.checkpoints import versions as known

  found = known.current()
  return {name: found[name] for name in LIBRARIES}


# --- tables ---


def as_table(lines: Lines) -> dict[str, Any]:
  """Returns a table as results have it: a header, and rows of cells.

  A cell is null, text, a number of six digits, or two: a mean and its ±.
  """
  header = list(dict.fromkeys(name for line in lines for name in line))
  rows = [[_rounded(line.get(name)) for name in header] for line in lines]
  return {"header": header, "rows": rows}


def _rounded(x: Any) -> Any:
  if isinstance(x, list | tuple):
    return [_rounded(y) for y in x]
  x = cli.plain(x)
  return float(f"{x:.6g}") if isinstance(x, float) else x


def shown(lines: Lines) -> Lines:
  """Returns a table's lines with means as text, for the screen."""
  return [
    {n: str(x) if isinstance(x, stats.Mean) else x for n, x in line.items()}
    for line in lines
  ]


def markdown(table: Mapping[str, Any]) -> str:
  """Returns a result's table as Markdown.

  A number has four digits, or the five that it was stored with. Zeros at its
  end stay if most of its column have as many decimals: 4.5 among 4.516 and
  4.312 is 4.500.
  """
  columns = [_column(cells) for cells in zip(*table["rows"], strict=True)]
  return tables.markdown(table["header"], zip(*columns, strict=True))


def _column(cells: Sequence[Any]) -> list[str]:
  pairs = [x if isinstance(x, list) else (x, None) for x in cells]
  # Numbers have decimals in common, and so do their errors.
  usual = []
  for part in zip(*pairs, strict=True):
    found = [_decimals(x) for x in part if isinstance(x, float)]
    usual.append(max(set(found), key=lambda n: (found.count(n), n), default=0))
  return [_cell(mean, half, *usual) for mean, half in pairs]


def _room(x: float) -> int:
  """Returns how many decimals a number has room for."""
  digits = 5 if float(f"{x:.5g}") == x else 4
  # Never an exponent: pages are read by people.
  return max(0, digits - 1 - int(f"{x:e}".split("e")[1]))


def _decimals(x: float) -> int:
  """Returns how many decimals a number has, without zeros at its end."""
  return len(f"{x:.{_room(x)}f}".rstrip("0").partition(".")[2])


def _cell(value: Any, half: float | None, *usual: int) -> str:
  """Returns a cell's text, given its column's decimals."""
  if value is None:
    return ""
  if isinstance(value, bool | str):
    return str(value)
  if isinstance(value, int) and half is None:
    return f"{value:,}"
  both = [float(value)] if half is None else [float(value), float(half)]
  room = min(map(_room, both))
  return " ± ".join(
    f"{x:,.{max(_decimals(x), min(most, room))}f}"
    for x, most in zip(both, usual, strict=False)
  )


# --- files ---


def path_of(run: str) -> pathlib.Path:
  """Returns where the result of a run file is stored.

  Args:
    run: a run file under configs/, e.g. `runs/lora/claims_width.gin`, or what a
      page calls its result, with `.json` for `.gin`.

  Raises:
    UserError: it is not in a folder of `configs/runs`.
  """
  found = (CONFIGS / run).resolve()
  if not found.is_relative_to(CONFIGS / "runs"):
    raise UserError(
      f"{run}: expected a file in configs/runs/, whose results can be stored"
    )
  return found.parent / "results" / f"{found.stem}.json"


def load(run: str) -> dict[str, Any]:
  """Returns the stored result of a run file; see `path_of`.

  Raises:
    UserError: there is none.
  """
  path = path_of(run)
  if not path.exists():
    raise UserError(f"{path}: no such result; experiments.study --render it")
  return json.loads(path.read_text("utf-8"))


def pages() -> Iterator[pathlib.Path]:
  """Yields the pages of this repository."""
  yield from sorted(ROOT.glob("*.md"))
  for room in ROOMS:
    yield from sorted((ROOT / room).rglob("*.md"))


def origin(result: Mapping[str, Any]) -> str:
  """Returns the line below a result's tables: command, commits, machine.

  It says so where this tree has the command or its run file no more.
  """
  commits = result.get("row_commits", [result["commit"]])
  short = ", ".join(f"`{x[:7]}{'+' * x.endswith('+')}`" for x in commits)
  text = result["command"]
  command = f"`{text}`" if text else "No command prints it"
  modules = re.findall(r"-m (experiments[\w.]+)", text)
  files = [ROOT / f"{x.replace('.', '/')}.py" for x in modules]
  runs = re.findall(r"--(?:config|sweep)=([\w/]+\.gin)", text)
  files += [CONFIGS / run for run in runs]
  if not all(file.exists() for file in files):
    command = f"Today's tree does not rerun it. {command}"
  return textwrap.fill(
    f"{command}; recorded by {short}; {result['machine']}.",
    80,
    break_long_words=False,
    break_on_hyphens=False,
  )


def rewrite(text: str) -> str:
  """Returns a page with its marked tables as the results have them.

  Raises:
    UserError: a result, or a table in it, is not there.
  """

  def block(found: re.Match[str]) -> str:
    result = load(found["path"])
    table = _table(result, found["table"], found["path"])
    parts = found[1], markdown(table), "", origin(result), found["end"]
    return "\n".join(parts)

  return _CLAIMS.sub(_claims, _BLOCK.sub(block, text))


def _claims(table: re.Match[str]) -> str:
  """Returns a table of claims with their effects in the column "found"."""
  names, *lines = (
    [x.strip() for x in line.strip()[1:-1].split("|")]
    for line in (table["head"].splitlines()[0], *table["lines"].splitlines())
  )
  for line in lines:
    run = re.search(r"configs/(\S+)\.gin\)", line[names.index("run file")])
    words = line[names.index("as tested")]
    line[names.index("found")] = _effect(f"{run[1]}.json", words) if run else ""
  return table["head"] + "".join(f"| {' | '.join(x)} |\n" for x in lines)


def _effect(path: str, words: str) -> str:
  """Returns what was found for the claim that begins with these words.

  "" where the result, an older one, has no verdicts that say it.
  """
  if not path_of(path).exists():
    return ""
  verdicts = load(path).get("verdicts", ())
  return next(
    (x["found"] for x in verdicts if x["claim"].startswith(words)), ""
  )


def _table(
  result: Mapping[str, Any], name: str, path: str
) -> Mapping[str, Any]:
  """Returns a table of a result by its number, or that of its verdicts.

  Raises:
    UserError: the result has no such table.
  """
  if name == "verdicts":
    if not (found := result.get("verdicts")):
      raise UserError(f"{path}: found no verdicts, expected some")
    return as_table(found)
  made = result["tables"]
  if int(name) >= len(made):
    raise UserError(f"{path}: found {len(made)} tables, expected number {name}")
  return made[int(name)]


def bars(page: pathlib.Path, text: str) -> dict[pathlib.Path, str]:
  """Returns the pictures that a page asks for, as SVG by their files.

  Raises:
    UserError: a result, or a table in it, is not there.
  """
  return {
    page.parent / found["file"]: page_bars.svg(
      _table(load(found["path"]), found["table"], found["path"])
    )
    for found in _BARS.finditer(text)
  }


def render_pages(write: bool = True) -> list[pathlib.Path]:
  """Writes the marked tables and bars of all pages; `make pages` calls it.

  Args:
    write: whether to; else files stay as they are.

  Returns:
    The files that were not as their results are.
  """
  changed = []
  for page in pages():
    text = page.read_text("utf-8")
    for path, after in {page: rewrite(text), **bars(page, text)}.items():
      before = path.read_text("utf-8") if path.exists() else None
      if after != before:
        changed.append(path)
        if write:
          path.write_text(after, "utf-8")
  return changed


def render(config: str, result: Mapping[str, Any]) -> list[pathlib.Path]:
  """Stores a result beside its run file and rewrites the pages that show it.

  Returns:
    The files that changed.
  """
  path = path_of(config)
  path.parent.mkdir(exist_ok=True)
  changed = []
  text = json_text(result)
  if not path.exists() or path.read_text("utf-8") != text:
    path.write_text(text, "utf-8")
    changed.append(path)
  return changed + render_pages()


def json_text(result: Mapping[str, Any]) -> str:
  """Returns a result as its file has it: a row of a table is a line."""
  return _json(cli.plain(result), "\n") + "\n"


def _json(x: Any, end: str) -> str:
  """Returns JSON, indented where something has parts.

  Args:
    end: what ends a line here: a newline and the indentation; "" for one line.
  """
  inner = end + " "
  if isinstance(x, dict) and x:
    parts = [f"{json.dumps(k)}: {_json(v, inner)}" for k, v in x.items()]
    return f"{{{inner}{f',{inner}'.join(parts)}{end}}}"
  if end and isinstance(x, list) and any(isinstance(y, dict | list) for y in x):
    # Of a list of lists, as the rows of a table are, each is a line.
    parts = [_json(y, inner if isinstance(y, dict) else "") for y in x]
    return f"[{inner}{f',{inner}'.join(parts)}{end}]"
  return json.dumps(x, ensure_ascii=False)
