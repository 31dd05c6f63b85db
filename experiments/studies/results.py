"""A study's result: where it comes from, as JSON, and in pages.

A result is stored beside its run file, that of `runs/lora/NAME.gin` in
`configs/runs/lora/results/NAME.json`. A page shows one of its tables between
two lines,

  <!-- results: runs/lora/NAME.json TABLE -->
  <!-- end -->

with TABLE its number, from 0, and what stands between them is written by
`rewrite`.
"""

import json
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.core import cli, stats
from experiments.core.config import CONFIGS
from experiments.studies.protocol import Lines
from research import tables
from research.typing import UserError

ROOT = CONFIGS.parent
ROOMS = "colab", "configs", "experiments", "kernels_pallas", "research"
LIBRARIES = "python", "jax", "jaxlib", "flax", "optax", "numpy"

_BLOCK = re.compile(
  r"^(<!-- results: (?P<path>\S+\.json) (?P<table>\d+) -->)$.*?"
  r"^(?P<end><!-- end -->)$",
  re.M | re.S,
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
  """Returns a result's table as Markdown."""
  cells = [[_cell(x) for x in row] for row in table["rows"]]
  return tables.markdown(table["header"], cells)


def _cell(value: Any) -> str:
  if value is None:
    return ""
  if isinstance(value, list):
    value, half = value
    return _cell(value) if half is None else f"{_cell(value)} ± {_cell(half)}"
  if isinstance(value, bool | str):
    return str(value)
  if isinstance(value, int):
    return f"{value:,}"
  # Four digits, but never an exponent: pages are read by people.
  digits = max(0, 3 - int(f"{value:e}".split("e")[1]))
  text = f"{value:,.{digits}f}"
  return text.rstrip("0").rstrip(".") if "." in text else text


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


def rewrite(text: str) -> str:
  """Returns a page with its marked tables as the results have them.

  Raises:
    UserError: a result, or a table in it, is not there.
  """

  def block(found: re.Match[str]) -> str:
    made = load(found["path"])["tables"]
    number = int(found["table"])
    if number >= len(made):
      raise UserError(
        f"{found['path']}: found {len(made)} tables, expected number {number}"
      )
    return f"{found[1]}\n{markdown(made[number])}\n{found['end']}"

  return _BLOCK.sub(block, text)


def render(config: str, result: Mapping[str, Any]) -> list[pathlib.Path]:
  """Stores a result beside its run file and rewrites the pages that show it.

  Args:
    config: the run file.
    result: of all its arms.

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
  for page in pages():
    before = page.read_text("utf-8")
    after = rewrite(before)
    if after != before:
      page.write_text(after, "utf-8")
      changed.append(page)
  return changed


def json_text(result: Mapping[str, Any]) -> str:
  """Returns a result as its file has it: a row of a table is a line."""
  return _json(cli.plain(result), "\n") + "\n"


def _json(x: Any, end: str) -> str:
  """Returns JSON, indented where something has parts.

  Args:
    x: plain values.
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
