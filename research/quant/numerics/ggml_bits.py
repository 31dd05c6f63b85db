"""Codes in the bytes of ggml's blocks; axes are `[..., codes, O]`.

Every function takes arrays of NumPy and of JAX, and returns the same.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np


def _of(x: Any) -> Any:
  return np if isinstance(x, np.ndarray) else jnp


def fold(codes: Any, bits: int, run: int) -> Any:
  """Returns codes in bytes, `8 / bits` to a byte, the first one low.

  Args:
    codes: uint8 `[..., S, O]`.
    bits: 1, 2 or 4.
    run: codes that lie in one byte are `run` apart.

  Returns:
    uint8 `[..., S bits / 8, O]`.
  """
  *lead, size, outputs = codes.shape
  fields = codes.reshape(*lead, -1, 8 // bits, run, outputs)
  out = fields[..., 0, :, :]
  for k in range(1, 8 // bits):
    out = out | fields[..., k, :, :] << (bits * k)
  return out.reshape(*lead, size * bits // 8, outputs)


def unfold(packed: Any, bits: int, run: int) -> Any:
  """Returns codes, uint8 `[..., S, O]`; inverts `fold`."""
  *lead, size, outputs = packed.shape
  shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None, None]
  fields = packed.reshape(*lead, -1, 1, run, outputs) >> shifts
  codes = fields & np.uint8(2**bits - 1)
  return codes.reshape(*lead, size * 8 // bits, outputs)


def fold_pairs(scale: Any, offset: Any) -> Any:
  """Returns 8 scales and 8 offsets of 6 bits, `[..., 8, O]`, in 12 bytes."""
  first, second = scale[..., :4, :], scale[..., 4:, :]
  third, fourth = offset[..., :4, :], offset[..., 4:, :]
  return _of(scale).concatenate(
    [
      first | second >> 4 << 6,
      third | fourth >> 4 << 6,
      second & 15 | (fourth & 15) << 4,
    ],
    axis=-2,
  )


def unfold_pairs(packed: Any) -> tuple[Any, Any]:
  """Returns (scales, offsets), uint8 `[..., 8, O]`; inverts `fold_pairs`."""
  low, drop, last = (packed[..., i : i + 4, :] for i in (0, 4, 8))
  join = _of(packed).concatenate
  scale = join([low & 63, last & 15 | low >> 6 << 4], axis=-2)
  offset = join([drop & 63, last >> 4 | drop >> 6 << 4], axis=-2)
  return scale, offset


def fold_sixes(scale: Any) -> Any:
  """Returns 16 scales of 6 bits, uint8 `[..., 16, O]`, in 12 bytes."""
  low, high = fold(scale & 15, 4, 8), fold(scale >> 4, 2, 4)
  return _of(scale).concatenate([low, high], axis=-2)


def unfold_sixes(packed: Any) -> Any:
  """Returns scales, uint8 `[..., 16, O]`; inverts `fold_sixes`."""
  low, high = packed[..., :8, :], packed[..., 8:, :]
  return unfold(low, 4, 8) | unfold(high, 2, 4) << 4
