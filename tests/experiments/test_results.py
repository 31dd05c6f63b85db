"""Results that are stored beside run files: their schema, and their pages."""

import json
import re
from xml.etree import ElementTree

import pytest

from experiments.core.config import CONFIGS
from experiments.studies import page_bars, results
from research.typing import UserError

STORED = sorted(CONFIGS.glob("runs/*/results/*.json"))
KEYS = {
  "command": str,
  "commit": str,
  "machine": str,
  "seeds": int | None,
  "tables": list,
}
OPTIONAL = {
  "note": str,
  "numbers": dict,
  "versions": dict,
  "seconds": int,
  "verdicts": list,
  "arms": dict,
  "row_commits": list,
  "failed": dict,
}


def is_cell(x):
  """A cell is null, text, a number, or a mean with its half, or without."""
  if isinstance(x, list):
    value, half = x
    return isinstance(value, int | float) and isinstance(
      half, float | int | None
    )
  return x is None or isinstance(x, str | int | float)


def test_there_are_results_of_every_system():
  folders = {path.parents[1].name for path in STORED}
  assert folders >= {"lora", "quant", "quantized_matmul", "llada"}


@pytest.mark.parametrize(
  "path", STORED, ids=lambda path: f"{path.parents[1].name}-{path.stem}"
)
def test_a_result_has_its_schema(path):
  text = path.read_text("utf-8")
  found = json.loads(text)
  assert results.json_text(found) == text
  assert KEYS.keys() <= found.keys() <= KEYS.keys() | OPTIONAL.keys()
  for name, kind in (KEYS | OPTIONAL).items():
    assert name not in found or isinstance(found[name], kind), name
  assert re.fullmatch(r"[0-9a-f]{40}\+?", found["commit"])
  for table in found["tables"]:
    assert table.keys() == {"header", "rows"} and table["rows"]
    assert all(isinstance(name, str) for name in table["header"])
    for row in table["rows"]:
      assert len(row) == len(table["header"])
      assert all(map(is_cell, row)), row
  for verdict in found.get("verdicts", ()):
    assert verdict["verdict"] in ("holds", "does not hold", "undecided")


@pytest.mark.parametrize(
  ("command", "gone"),
  [
    ("python -m experiments.study --config=runs/tour/tour.gin", False),
    ("python -m experiments.study --config=runs/tour/no.gin", True),
    ("python -m experiments.sweep --sweep=sweeps/no.gin --workdir=D", True),
    ("make bench && python -m experiments.no_command", True),
    ("", False),
  ],
)
def test_a_table_that_this_tree_cannot_rerun_says_so(command, gone):
  found = {"command": command, "commit": 40 * "a", "machine": "m"}
  line = results.origin(found)
  assert line.startswith("Today's tree does not rerun it") == gone
  assert command in " ".join(line.split()) and "`aaaaaaa`" in line


# --- pages ---

PAGES = {
  page.relative_to(results.ROOT).as_posix(): page.read_text("utf-8")
  for page in results.pages()
}
TABLE = r"^(.*)\n\|.*\n\|[ :|-]+\n(?:\|.*\n)+"
"""A table of a page, and the line above it."""
MARKED = re.compile(
  r"^<!-- results: runs/(\S+)/(\S+)\.json (\d+|verdicts) -->$", re.M
)


def test_pages_have_the_numbers_of_results():
  assert not results.render_pages(write=False), "make pages"


def test_bars_are_as_long_as_their_numbers():
  table = {
    "header": ["without", "right, %", "points", "from", "to"],
    "rows": [
      ["<nothing>", [80.0, 3.0], "", "", ""],
      ["a part", 20, -60.04, -70.0, -50],
    ],
  }
  root = ElementTree.fromstring(page_bars.svg(table))
  space = "{http://www.w3.org/2000/svg}"
  _, *drawn = root.iter(f"{space}rect")  # the first is the background
  lengths = [float(x.get("width")) for x in drawn]
  assert lengths[0] == 4 * lengths[1] > 0
  texts = [x.text for x in root.iter(f"{space}text")]
  assert texts[2:] == [
    *("<nothing>", "80.0 ± 3.0"),
    *("a part", "20.0  (-60.0: -70.0 to -50.0)"),
  ]


@pytest.mark.parametrize("cell", [None, "1", [-1.0, 0.0], float("nan")])
def test_bars_need_numbers(cell):
  table = {"header": ["a", "b"], "rows": [["x", cell]]}
  with pytest.raises(UserError, match="expected a number of 0 or more"):
    page_bars.svg(table)


def test_every_table_of_a_result_is_in_a_page():
  shown = {x for text in PAGES.values() for x in MARKED.findall(text)}
  shown = {x for x in shown if x[2] != "verdicts"}
  stored = {
    (path.parents[1].name, path.stem, str(number))
    for path in STORED
    for number in range(len(json.loads(path.read_text("utf-8"))["tables"]))
  }
  assert shown == stored


@pytest.mark.parametrize("page", [p for p in PAGES if p.endswith("RESULTS.md")])
def test_a_table_of_numbers_has_a_result(page):
  """Or says why it is written by hand."""
  above = re.findall(TABLE, PAGES[page], re.M)
  assert above
  by_hand = re.compile(r"<!-- (by hand: .+|claims) -->")
  wrong = [x for x in above if not (MARKED.match(x) or by_hand.match(x))]
  assert not wrong
