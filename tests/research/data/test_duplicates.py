"""Contamination check: against brute force, and errors above a threshold."""

import numpy as np
import pytest

from research.data import duplicates, sources
from research.data.sources import pydoc, synthetic
from research.typing import UserError


def _words(seed, n):
  rng = np.random.default_rng(seed)
  return [f"w{i}" for i in rng.integers(0, 10_000, n)]


def test_the_same_in_other_clothes():
  text = " ".join(_words(0, 30))
  dressed = text.upper().replace(" ", ",\n  ") + "!"
  report = duplicates.compare(["nothing", dressed], ["other words", text])
  [match] = report.matches
  assert (match.evaluation, match.train, match.exact) == (1, 1, True)
  assert match.share == 1
  wide = duplicates.compare(["ＦＵＬＬ width"], ["full WIDTH"])
  assert wide.matches[0].exact
  assert not duplicates.compare(["fall width"], ["full width"]).matches


@pytest.mark.parametrize("words", [1, 3, 13])
def test_shares_are_those_of_brute_force(words):
  rng = np.random.default_rng(1)
  pool = [" ".join(f"a{i}" for i in rng.integers(0, 6, 20)) for _ in range(6)]
  long = [_words(i, 60) for i in range(4)]
  train = [*pool[:3], " ".join(long[0]), " ".join(long[1])]
  evaluation = [
    *pool[3:],
    " ".join(long[0][10:40] + long[2]),
    " ".join(long[3]),
  ]

  def grams(text):
    w = text.split()
    return {tuple(w[i : i + words]) for i in range(max(1, len(w) - words + 1))}

  known = set().union(*map(grams, train))
  found = {
    m.evaluation: m
    for m in duplicates.compare(train, evaluation, words).matches
  }
  for i, text in enumerate(evaluation):
    share = len(grams(text) & known) / len(grams(text))
    assert share == (found[i].share if i in found else 0)
    if i in found:
      shared = [len(grams(text) & grams(t)) for t in train]
      assert shared[found[i].train] == max(shared)
  assert 3 in found and (words < 13 or 4 not in found)


def test_threshold():
  a, b = (" ".join(_words(i, 40)) for i in range(2))
  half = " ".join(a.split()[:26] + b.split()[:14])
  report = duplicates.compare([a], [half, b])
  assert report.matches[0].share == 14 / 28
  report.check(share=0.51)
  with pytest.raises(UserError, match="1 of 2 .* number 0, like training doc"):
    report.check(share=0.5)
  report.check(share=0.5, allowed=0.5)
  assert "2 evaluation documents: 0 are in" in report.table()
  with pytest.raises(UserError, match="evaluation documents are in"):
    duplicates.compare([a], [a, b]).check(share=1.1)  # exact ones always count


def test_empty_and_short_texts():
  report = duplicates.compare(["", "yes"], ["", "yes", "no"])
  assert [(m.evaluation, m.train) for m in report.matches] == [(1, 1)]
  assert not duplicates.compare([], ["a"]).matches
  # A short question within a longer text; less than 8 words say nothing.
  eight = "What is the capital city of the country"
  train = [f"Some words. {eight} France? More words follow, as in any text."]
  questions = [eight, f"{eight} France", "What is the capital city of"]
  found = duplicates.compare(train, questions)
  assert [(m.evaluation, m.train, m.share) for m in found.matches] == [
    *((0, 0, 1.0), (1, 0, 1.0))
  ]
  with pytest.raises(UserError, match="words: found 0"):
    duplicates.compare([], [], 0)


def test_our_own_splits_are_clean():
  train, heldout = (sources.PydocTopics(s) for s in ("train", "heldout"))
  report = duplicates.compare(*map(duplicates.source_texts, (train, heldout)))
  assert report.documents == len(heldout)
  assert not any(m.exact for m in report.matches)
  report.check(share=0.8)


def test_conversations_are_compared_without_their_template():
  """All questions have the same beginning and system prompt."""
  train, heldout = (pydoc.Questions(s) for s in ("train", "heldout"))
  report = duplicates.compare(*map(duplicates.source_texts, (train, heldout)))
  assert not report.above(0.5) and report.documents > 3
  with pytest.raises(UserError, match="no texts to compare"):
    duplicates.source_texts(synthetic.Copy())
