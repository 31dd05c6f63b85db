"""Packs codes of 1 to 8 bits into bytes, along the axis before the outputs.

A code is split into planes of 4, 2 and 1 bits (5 = 4 + 1), from its low bits
up, and each plane is packed separately: with `n` codes per byte, byte `j` holds
codes `j`, `j + size / n`, ..., low bits first. Unpacking thus takes shifts and
one concatenation of whole vectors, and wastes no bits.
"""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from research.typing import Array, UInt8, UserError


def planes(bits: int) -> Iterator[tuple[int, int]]:
  """Yields (width, lowest bit) of each plane of a code of `bits` bits."""
  start = 0
  for width in (8, 4, 2, 1):
    if bits & width:
      yield width, start
      start += width


def check(size: int, bits: int, what: str) -> None:
  """Raises UserError unless `size` codes of `bits` bits fill their bytes."""
  if not 1 <= bits <= 8:
    raise UserError(f"{what}: bits is {bits}, expected 1 to 8")
  least = max(8 // width for width, _ in planes(bits))
  if size < 1 or size % least:
    raise UserError(
      f"{what}: {size} codes of {bits} bits do not fill whole bytes: expected "
      f"a multiple of {least}"
    )


def pack(
  codes: UInt8[Array, "*B S O"] | np.ndarray, bits: int
) -> UInt8[Array, "*B P O"] | np.ndarray:
  """Packs codes into `P = S bits / 8` bytes; `unpack` inverts it.

  Args:
    codes: below `2**bits`; a NumPy array gives a NumPy array.
  """
  xp = np if isinstance(codes, np.ndarray) else jnp
  *lead, size, outputs = codes.shape
  check(size, bits, "packed codes")
  out = []
  for width, start in planes(bits):
    n = 8 // width
    plane = (codes >> start) & (2**width - 1)
    plane = plane.reshape(*lead, n, size // n, outputs)
    packed = plane[..., 0, :, :]
    for k in range(1, n):
      packed = packed | (plane[..., k, :, :] << (k * width))
    out.append(packed.astype(xp.uint8))
  return xp.concatenate(out, axis=-2)


def unpack(
  packed: UInt8[Array, "*B P O"] | np.ndarray, bits: int
) -> UInt8[Array, "*B S O"] | np.ndarray:
  """Unpacks codes `[..., 8 P / bits, O]`; inverts `pack`."""
  xp = np if isinstance(packed, np.ndarray) else jnp
  size = packed.shape[-2] * 8 // bits
  codes, at = None, 0
  for width, start in planes(bits):
    n = 8 // width
    plane = packed[..., at : at + size // n, :]
    at += size // n
    if n > 1:
      mask = 2**width - 1
      pieces = [(plane >> (k * width)) & mask for k in range(n)]
      plane = xp.concatenate(pieces, axis=-2)
    plane = plane << start
    codes = plane if codes is None else codes | plane
  return codes


def pack_pairs(
  codes: UInt8[Array, "*B X O"] | np.ndarray,
) -> UInt8[Array, "*B Y O"] | np.ndarray:
  """Packs neighbouring pairs of 4-bit codes into bytes, the first one low.

  Unlike with `pack`, slicing along `X` between pairs slices bytes. An odd
  number of codes is padded with 0.
  """
  if codes.shape[-2] % 2:
    xp = np if isinstance(codes, np.ndarray) else jnp
    codes = xp.concatenate([codes, xp.zeros_like(codes[..., :1, :])], axis=-2)
  return codes[..., 0::2, :] | (codes[..., 1::2, :] << 4)


def unpack_pairs(
  packed: UInt8[Array, "*B Y O"] | np.ndarray,
) -> UInt8[Array, "*B X O"] | np.ndarray:
  """Unpacks codes; inverts `pack_pairs`, up to its padding."""
  xp = np if isinstance(packed, np.ndarray) else jnp
  both = xp.stack([packed & 15, packed >> 4], axis=-2)
  *lead, y, _, outputs = both.shape
  return both.reshape(*lead, 2 * y, outputs)
