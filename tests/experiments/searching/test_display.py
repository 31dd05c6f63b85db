"""Traces to look at, also those of models that mean harm."""

import dataclasses
import html.parser
import unicodedata

import pytest

from experiments.searching import display
from research.reasoning.problem import Problem
from tests.experiments.searching.test_search_results import sample, searched

HOSTILE = (
  "<script>alert(1)</script>\x1b[2J\x1b]0;title\x07\x1b]8;;http://x\x1b\\link"
  "\x9b31mred\x90q\x9c\x1bP1;2q\x1b\\ \x08\x00\u202eevil\u2066\"'&</pre>\r"
)


class Tags(html.parser.HTMLParser):
  """Notes the tags and the text of a page."""

  def __init__(self, page):
    super().__init__()
    self.tags, self.words, self.names = set(), "", set()
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    self.names |= {name for name, _ in attrs}

  def handle_data(self, data):
    self.words += data


def hostile():
  one = searched(sample(HOSTILE, (0.1, 0.9)), sample(None, (0.5,), "length"))
  steps = one.samples[0].trace.steps
  worse = [dataclasses.replace(x, text=HOSTILE + x.text) for x in steps]
  trace = dataclasses.replace(one.samples[0].trace, steps=tuple(worse))
  samples = dataclasses.replace(one.samples[0], trace=trace), one.samples[1]
  return dataclasses.replace(
    one, samples=samples, problem=Problem("p", HOSTILE)
  )


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("a\n\tb", "a\n\tb"),
    ("\x1b[1;31mred\x1b[0m", "red"),
    ("\x1b]0;title\x07after", "after"),
    ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("\x9b2Kgone\x1bcreset\x1b(B", "gonereset"),
    ("\x1b", ""),
    ("\x1b[", ""),
    ("abc\u202edef\u2028", "abcdef"),
    ("7 × 8 = 56 ✓", "7 × 8 = 56 ✓"),
  ],
)
def test_what_a_terminal_would_obey_is_taken_out(text, expected):
  assert display.clean(text) == expected


def test_a_terminal_gets_no_codes_but_ours():
  plain = display.for_terminal(hostile(), color=False)
  kinds = {unicodedata.category(x) for x in plain.replace("\n", "")}
  assert not kinds & {"Cc", "Cf", "Zl", "Zp"}
  assert "0.10" in plain and "cut (length), no vote" in plain
  colored = display.for_terminal(hostile(), color=True)
  assert display.clean(colored) == plain
  assert "\x1b[38;5;202m" not in plain and "\x1b[38;5;" in colored


def test_a_page_has_no_tags_but_ours():
  page = display.page([hostile()] * 60, "<b>task</b>")
  found = Tags(page)
  assert found.tags == {
    *("html", "meta", "title", "style", "h1", "h2", "p", "section"),
    *("article", "pre", "span"),
  }
  assert not any(name.startswith("on") for name in found.names)
  assert "<script>alert(1)</script>" in found.words  # as text
  assert not any(ord(x) < 32 and x != "\n" for x in page)
  assert "default-src 'none'" in page
  assert page.count("<section>") == display.PROBLEMS
  assert "10 more problems" in page
