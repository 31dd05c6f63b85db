"""The table of the papers' claims: complete, and as the results have it."""

import json
import re

import pytest

from experiments.core.config import CONFIGS
from experiments.studies import results

PAGE = results.ROOT / "research" / "RESULTS.md"
TABLE = re.compile(
  r"^<!-- claims -->\n\|.*\n\|[ -|]+\n((?:\|.*\n)+)",
  re.M,
)
SIZES = {"L": 3, "V": 3, "F": 3, "P": 3, "Q": 3, "D": 4, "T": 3, "C": 2}
"""How many claims each system's papers make."""


def lines():
  """Returns the cells of each line: claim, run files, words, found, verdict."""
  (body,) = TABLE.findall(PAGE.read_text("utf-8"))
  return [
    [x.strip() for x in line[1:-1].split("|")] for line in body.splitlines()
  ]


def verdicts(run):
  """Returns (claim, verdict) of a run file's result, or of its system's."""
  path = results.path_of(run)
  return (path.exists() and recorded(path)) or recorded(
    path.with_name("claims.json")
  )


def recorded(path):
  """Returns (claim, verdict) of a result; older ones have them in a table."""
  found = json.loads(path.read_text("utf-8"))
  out = [(x["claim"], x["verdict"]) for x in found.get("verdicts", ())]
  for table in found["tables"]:
    names = [x.startswith(("verdict", "here")) for x in table["header"]]
    if any(names) and table["header"][0].startswith("claim"):
      out += [(row[0], row[names.index(True)]) for row in table["rows"]]
  return out


def test_every_claim_has_a_line():
  found = [line[0].split(" ")[0].rstrip(":") for line in lines() if line[0]]
  assert found == [f"{x}{i}" for x, n in SIZES.items() for i in range(1, n + 1)]


@pytest.mark.parametrize("line", lines(), ids=lambda x: x[2][:30] or x[4])
def test_a_line_says_what_its_result_does(line):
  """In its first words; each verdict up to a mark, or to its end."""
  _, runs, words, _, verdict = line
  files = re.findall(r"\.\./configs/(\S+\.gin)\)", runs)
  assert files or runs.startswith("no run file")
  for file in files:
    assert (CONFIGS / file).exists()
  if verdict == "not run yet":
    (run,) = files
    assert not results.path_of(run).exists()
  elif words:
    (found,) = [v for c, v in verdicts(files[0]) if c.startswith(words)]
    assert re.match(re.escape(verdict) + r"($|[,:;. ])", found)
