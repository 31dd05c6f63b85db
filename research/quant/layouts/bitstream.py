"""Codes packed into 32-bit words, as in GPTQ, compressed-tensors and AWQ files.

Each column is one dense bit stream, least significant bit first: code `i` has
bits `[i b, (i + 1) b)`. So 32 codes fill `b` words exactly, and codes of 3, 5,
6 or 7 bits may span two words. Where `b` divides 32 this is the usual "low bits
first" order. AWQ stores eight columns per word, in its own order.
"""

import numpy as np

from research.typing import UserError

AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column index of each nibble of a word, from the lowest nibble."""


def words(count: int, bits: int) -> int:
  """Returns the number of words for `count` codes of `bits` bits."""
  return -(-count * bits // 32)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
  """Packs codes into words int32 `[ceil(n bits / 32), O]`; see `unpack`.

  Args:
    codes: uint8 `[n, O]`, below `2**bits`; the last word is zero-padded.
    bits: bits of a code, 1 to 8.

  Raises:
    UserError: a code has more bits.
  """
  if codes.size and codes.max() >> bits:
    raise UserError(f"codes: found {codes.max()}, expected {bits} bits")
  count, outputs = codes.shape
  runs = -(-count // 32)
  filled = np.zeros((32 * runs, outputs), np.uint32)
  filled[:count] = codes
  filled = filled.reshape(runs, 32, outputs)
  out = np.zeros((runs, bits, outputs), np.uint32)
  for i in range(32):
    word, shift = divmod(i * bits, 32)
    out[:, word] |= filled[:, i] << np.uint32(shift)
    if shift + bits > 32:
      out[:, word + 1] |= filled[:, i] >> np.uint32(32 - shift)
  flat = out.reshape(runs * bits, outputs)
  return flat[: words(count, bits)].view(np.int32)


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
  """Unpacks codes, uint8 `[count, O]`; inverts `pack`.

  Args:
    packed: int32 or uint32 `[words(count, bits), O]`.
    count: number of codes per column.

  Raises:
    UserError: `packed` has another number of words.
  """
  size, outputs = packed.shape
  if size != words(count, bits):
    raise UserError(
      f"packed codes: found {size} words, expected {words(count, bits)} for "
      f"{count} codes of {bits} bits"
    )
  # Runs of 32 codes, or of one word if no code spans two words.
  span = 32 // bits if 32 % bits == 0 else 32
  per = span * bits // 32
  runs = -(-count // span)
  source = packed.view(np.uint32)
  if size < runs * per:
    source = np.concatenate(
      [source, np.zeros((runs * per - size, outputs), np.uint32)]
    )
  source = source.reshape(runs, per, outputs)
  out = np.empty((runs, span, outputs), np.uint8)
  mask = np.uint32(2**bits - 1)
  for i in range(span):
    word, shift = divmod(i * bits, 32)
    code = source[:, word] >> np.uint32(shift)
    if shift + bits > 32:
      code = code | (source[:, word + 1] << np.uint32(32 - shift))
    out[:, i] = code & mask
  return out.reshape(runs * span, outputs)[:count]


def pack_awq(codes: np.ndarray) -> np.ndarray:
  """Packs 4-bit codes `[R, O]`, eight columns per word, int32 `[R, O / 8]`."""
  rows, outputs = codes.shape
  if outputs % 8:
    raise UserError(f"AWQ: {outputs} columns, expected a multiple of 8")
  groups = codes.reshape(rows, outputs // 8, 8).astype(np.uint32)
  out = np.zeros((rows, outputs // 8), np.uint32)
  for i, column in enumerate(AWQ):
    out |= groups[..., column] << np.uint32(4 * i)
  return out.view(np.int32)


def unpack_awq(packed: np.ndarray) -> np.ndarray:
  """Unpacks words int32 `[R, C]` to codes uint8 `[R, 8 C]`."""
  rows, columns = packed.shape
  source = np.ascontiguousarray(packed).view(np.uint32)
  out = np.empty((rows, columns, 8), np.uint8)
  for i, column in enumerate(AWQ):
    out[..., column] = (source >> np.uint32(4 * i)) & np.uint32(15)
  return out.reshape(rows, 8 * columns)
