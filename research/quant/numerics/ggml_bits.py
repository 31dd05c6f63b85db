"""Bit packing of codes and scales in ggml's blocks; axes `[..., codes, O]`.

Every function takes NumPy or JAX arrays and returns arrays of the same kind.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np


def _array_module(x: Any) -> Any:
  return np if isinstance(x, np.ndarray) else jnp


def fold(codes: Any, bits: int, run: int) -> Any:
  """Packs `8 / bits` codes per byte, the first one in the low bits.

  Args:
    codes: uint8 `[..., S, O]`.
    bits: 1, 2 or 4.
    run: distance between the codes of one byte.

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
  """Unpacks codes, uint8 `[..., S, O]`; inverts `fold`."""
  *lead, size, outputs = packed.shape
  shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None, None]
  fields = packed.reshape(*lead, -1, 1, run, outputs) >> shifts
  codes = fields & np.uint8(2**bits - 1)
  return codes.reshape(*lead, size * 8 // bits, outputs)


def fold_pairs(scale: Any, offset: Any) -> Any:
  """Packs 8 scales and 8 offsets of 6 bits, `[..., 8, O]`, into 12 bytes."""
  first, second = scale[..., :4, :], scale[..., 4:, :]
  third, fourth = offset[..., :4, :], offset[..., 4:, :]
  return _array_module(scale).concatenate(
    [
      first | second >> 4 << 6,
      third | fourth >> 4 << 6,
      second & 15 | (fourth & 15) << 4,
    ],
    axis=-2,
  )


def unfold_pairs(packed: Any) -> tuple[Any, Any]:
  """Unpacks (scales, offsets), uint8 `[..., 8, O]`; inverts `fold_pairs`."""
  low, drop, last = (packed[..., i : i + 4, :] for i in (0, 4, 8))
  join = _array_module(packed).concatenate
  scale = join([low & 63, last & 15 | low >> 6 << 4], axis=-2)
  offset = join([drop & 63, last >> 4 | drop >> 6 << 4], axis=-2)
  return scale, offset


def fold_sixes(scale: Any) -> Any:
  """Packs 16 scales of 6 bits, uint8 `[..., 16, O]`, into 12 bytes."""
  low, high = fold(scale & 15, 4, 8), fold(scale >> 4, 2, 4)
  return _array_module(scale).concatenate([low, high], axis=-2)


def unfold_sixes(packed: Any) -> Any:
  """Unpacks scales, uint8 `[..., 16, O]`; inverts `fold_sixes`."""
  low, high = packed[..., :8, :], packed[..., 8:, :]
  return unfold(low, 4, 8) | unfold(high, 2, 4) << 4
