"""KIVI as in its paper, in NumPy: which tokens are packed when, and to what.

Written from the formulas: s = (max - min) / (2^b - 1), q = round((x - min) / s)
clipped to 0 .. 2^b - 1, x' = q s + min, both in float16; keys by `group` tokens
of a channel, values by `group` channels of a token.
"""

import numpy as np


def rounded(x: np.ndarray, bits: int, axis: int) -> np.ndarray:
  """Returns numbers packed and unpacked; groups lie along `axis`."""
  low, top = (f(axis, keepdims=True) for f in (x.min, x.max))
  scale = (top - low) / np.float32(2**bits - 1)
  low, scale = (y.astype(np.float16).astype(np.float32) for y in (low, scale))
  scale = np.where(scale == 0, np.float32(1), scale)
  codes = np.clip(np.round((x - low) / scale), 0, 2**bits - 1)
  return codes * scale + low


def per_channel(x: np.ndarray, bits: int, group: int) -> np.ndarray:
  """Returns `[S, H]` by groups of tokens."""
  tokens, dim = x.shape
  x = x.reshape(tokens // group, group, dim)
  return rounded(x, bits, 1).reshape(tokens, dim)


def per_token(x: np.ndarray, bits: int, group: int) -> np.ndarray:
  """Returns `[S, H]` by groups of channels."""
  tokens, dim = x.shape
  x = x.reshape(tokens, dim // group, group)
  return rounded(x, bits, 2).reshape(tokens, dim)


def remembered(
  x: np.ndarray,
  along: str,
  bits: int,
  group: int,
  residual: int,
  sinks: int = 0,
) -> np.ndarray:
  """Returns what is left of the tokens `[S, H]` of a row, none to come.

  Args:
    x: all tokens that were written.
    along: "channel" or "token".
    bits: of a code.
    group: numbers that share a scale.
    residual: tokens in full precision, or packed at a time.
    sinks: first tokens in full precision.
  """
  out = x.copy()
  rest = out[sinks:]
  if along == "channel":
    unit = max(residual, group)
    packed = len(rest) // unit * unit
    rest[:packed] = per_channel(rest[:packed], bits, group)
  else:
    packed = max(len(rest) - residual, 0)
    rest[:packed] = per_token(rest[:packed], bits, group)
  return out
