"""Baselines for text modelling: general compressors and an n-gram model.

All results are in bits per byte, to compare with a language model. The model
has read the training text, so for a fair comparison the baselines may, too.
"""

import bz2
import lzma
import zlib

import numpy as np

_WINDOW = 1 << 27
"""Maximum dictionary size of xz, in bytes."""


def compressed(text: bytes, known: bytes = b"") -> dict[str, float]:
  """Returns compressor -> bits per byte of `text`.

  Args:
    known: training text. `xz_after_training` is the increase in compressed size
      when `text` is appended to `known`, all of it within xz's dictionary.
  """
  sizes = {
    "gzip": len(zlib.compress(text, 9)),
    "bzip2": len(bz2.compress(text)),
    "xz": _xz(text),
  }
  if known:
    sizes["xz_after_training"] = _xz(known + text) - _xz(known)
  return {name: 8 * size / len(text) for name, size in sizes.items()}


def _xz(text: bytes) -> int:
  size = min(_WINDOW, max(len(text), 1 << 12))
  filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": size}]
  return len(lzma.compress(text, lzma.FORMAT_XZ, filters=filters))


def ngram(text: bytes, known: bytes, order: int = 7) -> float:
  """Returns the bits per byte of `text` under an n-gram model of `known`.

  Byte n-grams, interpolated by Witten & Bell 1991 (method C), from the uniform
  distribution over bytes up to contexts h of `order - 1` bytes:

    p(c | h) = (n(h c) + u(h) p(c | h')) / (n(h) + u(h))

  where n counts, u(h) is the number of distinct bytes seen after h, and h' is
  h without its first byte.

  Args:
    text: the text to predict, each byte from the preceding ones.
    known: the training text.
    order: length of the longest n-gram in bytes; at most 8.

  Raises:
    ValueError: `order` is not in 1 to 8.
  """
  if not 1 <= order <= 8:
    raise ValueError(f"order is {order}, expected 1 to 8")
  p = np.full(len(text), 1 / 256)
  for size in range(1, order + 1):
    grams, counts = np.unique(_grams(known, size), return_counts=True)
    contexts, starts = np.unique(grams >> np.uint64(8), return_index=True)
    seen = np.add.reduceat(counts, starts) if len(starts) else starts
    different = np.diff([*starts, len(grams)])
    wanted = _grams(text, size)
    n = _look_up(grams, counts, wanted)
    total = _look_up(contexts, seen, wanted >> np.uint64(8))
    unlike = _look_up(contexts, different, wanted >> np.uint64(8))
    shorter = p[size - 1 :]
    mixed = (n + unlike * shorter) / np.maximum(total + unlike, 1)
    p[size - 1 :] = np.where(total > 0, mixed, shorter)
  return float(-np.log2(p).mean())


def _grams(text: bytes, size: int) -> np.ndarray:
  """Returns the byte n-grams of `size` as numbers, uint64 [n - size + 1]."""
  x = np.frombuffer(text, np.uint8).astype(np.uint64)
  count = max(len(x) - size + 1, 0)
  out = np.zeros(count, np.uint64)
  for i in range(size):
    out = (out << np.uint64(8)) | x[i : i + count]
  return out


def _look_up(keys, values, wanted) -> np.ndarray:
  """Looks up each of `wanted` in sorted `keys`; 0 if it is missing."""
  if not len(keys):
    return np.zeros(len(wanted))
  at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
  return np.where(keys[at] == wanted, values[at], 0)
