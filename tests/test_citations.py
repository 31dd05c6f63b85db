"""Every page, and every section of one, that a source file cites is there.

A citation names the page by its path and, as numbers behind it, its sections:
`research/lora/MATH.md 2.4` or `kernels_pallas/MATH.md 1 and 3`.
"""

import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("colab", "configs", "experiments", "kernels_pallas", "research")
SUFFIXES = (".py", ".gin", ".cc", ".h", ".inc", ".ipynb")
EXAMPLES = {"test_citations.py", "test_pages.py"}
"""Tests whose text has broken ones."""
OTHERS = {"EVAL.md", "printed.md", "COINS.md"}
"""Pages of other people's repositories, and those that tests write."""
NUMBER = r"\d+(?:\.\d+)*\b"
CITATION = re.compile(
  r"(?P<page>(?:[\w-]+/)*[\w-]+\.md)\b"
  rf"(?P<sections>(?:\s+{NUMBER}(?:(?:,| and| to)\s+{NUMBER})*)?)"
)


def citations(text: str) -> list[tuple[str, tuple[str, ...]]]:
  """Returns (page, sections) of each citation; comments are unwrapped."""
  text = re.sub(r"\n\s*(#|//)?[ \t]*", " ", text)
  return [
    (m["page"], tuple(re.findall(NUMBER, m["sections"])))
    for m in CITATION.finditer(text)
  ]


@functools.cache
def sections(page: pathlib.Path) -> set[str]:
  """Returns the numbers of a page's headings and of its bold paragraphs."""
  text = page.read_text("utf-8")
  pattern = rf"^(?:#+ |\*\*)({NUMBER})"
  return set(re.findall(pattern, text, re.M))


@functools.cache
def names() -> set[str]:
  """Returns the names of all pages, without their folders."""
  return {p.name for name in FOLDERS for p in (ROOT / name).rglob("*.md")}


def broken(text: str) -> list[str]:
  """Returns what a source cites and the repository has not."""
  out = []
  for name, numbers in citations(text):
    page = ROOT / name
    if page.exists():
      out += [f"{name} {n}" for n in numbers if n not in sections(page)]
    elif numbers or name not in names() | OTHERS:
      out.append(name)
  return out


def sources(*folders: str) -> list[pathlib.Path]:
  return [
    path
    for folder in folders
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in SUFFIXES and ".venv" not in path.parts
  ]


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_what_is_cited_is_there(folder):
  wrong = {
    str(path.relative_to(ROOT)): found
    for path in sources(folder)
    if path.name not in EXAMPLES and (found := broken(path.read_text("utf-8")))
  }
  assert not wrong


def test_some_are_cited():
  texts = [p.read_text("utf-8") for p in sources(*FOLDERS)]
  found = [c for text in texts for c in citations(text)]
  assert len([numbers for _, numbers in found if numbers]) > 30


@pytest.mark.parametrize(
  ("text", "wrong"),
  [
    ("see lora.md 4.1", ["lora.md"]),
    ("research/lora/MATH.md 2.4", []),
    ("(research/lora/MATH.md\n  2.4), 17", []),
    ("# research/lora/MATH.md\n# 2.9", ["research/lora/MATH.md 2.9"]),
    ("kernels_pallas/MATH.md 1 and 99", ["kernels_pallas/MATH.md 99"]),
    ("research/lora/MATH.md 7.1 to 7.3", []),
    ("MATH.md 2.4", ["MATH.md"]),
    ("ours of README.md and nowhere.md", ["nowhere.md"]),
  ],
)
def test_a_wrong_one_is_found(text, wrong):
  assert broken(text) == wrong
