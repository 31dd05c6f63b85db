"""Tests that files named in quantization's README exist, and vice versa."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[3]
TEXT = (ROOT / "research" / "quant" / "README.md").read_text("utf-8")


def test_every_format_has_a_place_in_the_table():
  files = (ROOT / "research" / "quant" / "formats").glob("*.py")
  names = {f.name for f in files} - {"__init__.py"}
  assert names and not {n for n in names if f"`{n}`" not in TEXT}


def test_files_and_run_files_that_are_named_exist():
  quant = ROOT / "research" / "quant"
  bare = {f.name for f in quant.rglob("*.py")}
  named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", TEXT))
  assert named
  assert not [
    n for n in named - bare if not any((r / n).exists() for r in (quant, ROOT))
  ]
  runs = set(re.findall(r"runs/quant/[\w.]+\.gin", TEXT))
  assert runs and not [r for r in runs if not (ROOT / "configs" / r).exists()]
  commands = set(re.findall(r"python -m (experiments(?:\.\w+)+)", TEXT))
  for name in commands:
    assert (ROOT / (name.replace(".", "/") + ".py")).exists(), name
