"""Tests that the page of quantization's results names are there."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = (ROOT / "research" / "quant" / "RESULTS.md").read_text("utf-8")
NAMED = sorted(set(re.findall(r"`(\w+)/(test_\w+)\.(test_\w+)`", TEXT)))


def test_the_matrix_of_tools_names_tests():
  assert len(NAMED) > 10


@pytest.mark.parametrize(
  "folder, module, test", NAMED, ids=[".".join(x) for x in NAMED]
)
def test_a_test_that_is_named_exists(folder, module, test):
  found = list((ROOT / "tests").glob(f"**/{folder}/{module}.py"))
  assert len(found) == 1
  assert f"\ndef {test}(" in found[0].read_text("utf-8")
