"""Baselines: a normalised distribution, and counts done by hand."""

import collections
import math

import numpy as np
import pytest

from research.data import baselines

KNOWN = b"abracadabra abracadabra the cat sat on the mat, the rat sat too "


def by_hand(text, known, order):
  """Witten & Bell's recursion, one byte at a time, with dictionaries."""
  count = collections.Counter(
    known[i : i + n]
    for n in range(1, order + 1)
    for i in range(len(known) - n + 1)
  )

  def p(context, byte):
    shorter = p(context[1:], byte) if context else 1 / 256
    after = [count[context + bytes([b])] for b in range(256)]
    total, unlike = sum(after), sum(n > 0 for n in after)
    if not total:
      return shorter
    n = count[context + bytes([byte])]
    return (n + unlike * shorter) / (total + unlike)

  return [
    p(text[max(0, i - order + 1) : i], byte) for i, byte in enumerate(text)
  ]


@pytest.mark.parametrize("order", [1, 2, 4])
def test_ngrams_are_those_counted_by_hand(order):
  text = b"the abbot sat\xff on a cadaver"
  want = -np.mean(np.log2(by_hand(text, KNOWN, order)))
  assert baselines.ngram(text, KNOWN, order) == pytest.approx(want, rel=1e-12)


def test_probabilities_of_all_continuations_sum_to_one():
  prefix = b"the cat"
  total = 0.0
  for byte in range(256):
    with_it = baselines.ngram(prefix + bytes([byte]), KNOWN, 5) * 8
    without = baselines.ngram(prefix, KNOWN, 5) * 7
    total += 2.0 ** (without - with_it)
  assert total == pytest.approx(1, rel=1e-9)


def test_without_knowledge_a_byte_costs_eight_bits():
  assert baselines.ngram(b"anything", b"", 3) == 8


def test_more_context_helps_on_text_that_repeats():
  text = KNOWN * 40
  bits = [baselines.ngram(text, KNOWN * 9, n) for n in (1, 2, 4, 8)]
  assert bits == sorted(bits, reverse=True)
  with pytest.raises(ValueError, match="1 to 8"):
    baselines.ngram(text, KNOWN, 9)


def test_compressors_count_bits():
  rng = np.random.default_rng(0)
  noise = rng.bytes(20_000)
  found = baselines.compressed(noise, noise)
  # Noise does not compress; what is known costs a reference in 273 bytes.
  assert set(found) == {"gzip", "bzip2", "xz", "xz_after_training"}
  assert all(8 <= found[n] < 8.2 for n in ("gzip", "bzip2", "xz"))
  assert found["xz_after_training"] < 0.2
  letters = bytes(rng.integers(0, 2, 20_000, np.uint8) + ord("a"))
  floor = 1.0  # a coin a byte
  assert all(
    floor < bits < 1.6 for bits in baselines.compressed(letters).values()
  )
  assert math.isclose(baselines.ngram(letters, letters, 1), 1, abs_tol=1e-2)
