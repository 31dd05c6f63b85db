"""Tests words of codes against Python integers, and round trips."""

import numpy as np
import pytest

from research.quant.layouts import bitstream
from research.typing import UserError


def codes(count, outputs, bits, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 2**bits, (count, outputs)).astype(np.uint8)


def by_definition(column, bits):
  """Returns the words of one column as Python's integers have them."""
  whole = sum(int(code) << (i * bits) for i, code in enumerate(column))
  size = -(-len(column) * bits // 32)
  raw = whole.to_bytes(4 * size, "little")
  return np.frombuffer(raw, np.int32)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 64, 77])
def test_bits_are_one_little_endian_number(bits, count):
  x = codes(count, 3, bits)
  got = bitstream.pack(x, bits)
  for o in range(3):
    np.testing.assert_array_equal(got[:, o], by_definition(x[:, o], bits))
  np.testing.assert_array_equal(bitstream.unpack(got, bits, count), x)


def test_three_bit_codes_span_words():
  """Code 10 has two bits in the first word, code 21 one in the second."""
  x = codes(32, 1, 3)
  v = x[:, 0].astype(np.uint64)
  word = [
    sum(v[k] << np.uint64(3 * k) for k in range(10)) | (v[10] & 3) << 30,
    v[10] >> 2 | sum(v[11 + k] << np.uint64(3 * k + 1) for k in range(10)),
    v[21] >> 1 | sum(v[22 + k] << np.uint64(3 * k + 2) for k in range(10)),
  ]
  word[1] |= (v[21] & 1) << np.uint64(31)
  want = np.array(word, np.uint64).astype(np.uint32)
  got = bitstream.pack(x, 3)[:, 0].view(np.uint32)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  ("bits", "code", "word"),
  [(4, 7, 0x77777777), (4, 8, 0x88888888), (2, 1, 0x55555555)],
)
def test_words_of_one_code(bits, code, word):
  got = bitstream.pack(np.full((32 // bits, 1), code, np.uint8), bits)
  assert got.view(np.uint32)[0, 0] == word


def test_awq_has_its_own_order():
  x = np.arange(8, dtype=np.uint8)[None]
  assert bitstream.pack_awq(x).view(np.uint32)[0, 0] == 0x75316420
  x = codes(5, 24, 4)
  got = bitstream.pack_awq(x)
  assert got.shape == (5, 3)
  np.testing.assert_array_equal(bitstream.unpack_awq(got), x)


def test_mistakes():
  with pytest.raises(UserError, match="found 9, expected 3 bits"):
    bitstream.pack(np.full((32, 1), 9, np.uint8), 3)
  with pytest.raises(UserError, match="found 2 words, expected 3"):
    bitstream.unpack(np.zeros((2, 1), np.int32), 3, 32)
  with pytest.raises(UserError, match="12 columns, expected a multiple of 8"):
    bitstream.pack_awq(np.zeros((2, 12), np.uint8))
