"""Tests that files named in quantization's pages exist, and vice versa."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[3]
README, RESULTS = (
  (ROOT / "research" / "quant" / name).read_text("utf-8")
  for name in ("README.md", "RESULTS.md")
)


def test_every_format_has_a_place_in_the_table():
  files = (ROOT / "research" / "quant" / "formats").glob("*.py")
  names = {f.name for f in files} - {"__init__.py"}
  assert names and not {n for n in names if f"`{n}`" not in README}


def test_files_and_run_files_that_are_named_exist():
  quant = ROOT / "research" / "quant"
  bare = {f.name for f in quant.rglob("*.py")}
  named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", README + RESULTS))
  assert named
  assert not [
    n for n in named - bare if not any((r / n).exists() for r in (quant, ROOT))
  ]
