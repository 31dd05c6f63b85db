"""Rotations in GGUF files: keys, and the factors of Llama 3's scaling.

llama.cpp divides the frequencies by `rope_freqs.weight`. Its converter writes
there what Llama 3's scaling (`research.nn.rope.Llama3`) divides by, and none of
the numbers that make it, so that they are found again here.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from research.interop.gguf import Tensor, tensor_types
from research.interop.gguf.names import ROPE_FACTORS
from research.nn.attention import Attention
from research.nn.rope import Linear, Llama3, Yarn, inverse_frequencies
from research.nn.transformer import Transformer
from research.typing import UserError

BANDS: Mapping[str, float] = {"low": 1.0, "high": 4.0}
"""Of every Llama 3.1 to 3.3; a file holds only what follows from them."""

_LENGTH = 8192
"""Theirs, too."""


def to_metadata(a: Attention) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """Returns the keys and tensors that say how a rotation is extended."""
  match a.rope.scaling:
    case None:
      return {}, {}
    case Linear(factor=factor):
      kind = {"rope.scaling.type": "linear"}
      return kind | {"rope.scaling.factor": float(factor)}, {}
    case Yarn() as yarn:
      return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(yarn.factor),
        "rope.scaling.original_context_length": yarn.original,
        "rope.scaling.yarn_beta_fast": float(yarn.fast),
        "rope.scaling.yarn_beta_slow": float(yarn.slow),
      }, {}
    case Llama3() as llama3:
      bands = {"low": llama3.low, "high": llama3.high}
      if bands != dict(BANDS):
        raise UserError(
          "GGUF: a rotation scaled as Llama 3's is one with bands "
          f"low={llama3.low:g} and high={llama3.high:g}, expected 1 and 4: a "
          "file has no place for others. Keep the model as --format=hf"
        )
      plain = inverse_frequencies(a.rope.theta, a.head_dim)
      scaled = llama3.frequencies(a.rope.theta, a.head_dim, None)[0]
      factors = np.asarray(plain / scaled, np.float32)
      raw = tensor_types.encode("F32", factors)
      # llama.cpp reads the factors alone; which length they are of does not
      # follow from them where no frequency lies between the bands.
      length = {"rope.scaling.original_context_length": llama3.original}
      return length, {ROPE_FACTORS: Tensor("F32", factors.shape, raw)}
  kind = type(a.rope.scaling).__name__
  raise UserError(
    f"GGUF: no way to say a rotation scaled by {kind}; expected linear, yarn "
    "or llama3. Keep the model as --format=hf"
  )


def without_llama3(a: Attention) -> Attention:
  """Returns it without Llama 3's scaling, of which files hold what it does."""
  if a.rope is None or not isinstance(a.rope.scaling, Llama3):
    return a
  return a.clone(rope=dataclasses.replace(a.rope, scaling=None))


def same_frequencies(one: Transformer, other: Transformer) -> bool:
  """Whether rotations of Llama 3's scaling have the same frequencies."""

  def frequencies(m):
    found = [(k.attention.rope, k.attention.head_dim) for k in m.layer_kinds()]
    return np.concatenate(
      [
        r.scaling.frequencies(r.theta, dim, None)[0]
        for r, dim in found
        if r is not None and isinstance(r.scaling, Llama3)
      ]
      or [np.zeros(0)]
    )

  x, y = frequencies(one), frequencies(other)
  # Divisors are float32.
  return x.shape == y.shape and np.allclose(x, y, rtol=1e-6, atol=0)


def llama3_from_factors(
  path: str, factors: np.ndarray, theta: float, dim: int, original: int | None
) -> Llama3:
  """Returns the scaling whose divisors of the frequencies are `factors`.

  Args:
    factors: `[dim / 2]`.
    original: the length that the file has, or None. No other tool writes it:
      then it is one that gives these divisors, as several may.

  Raises:
    UserError: they are no such scaling's.
  """
  plain = inverse_frequencies(theta, dim)
  if factors.shape != plain.shape or not (factors >= 1).all():
    raise UserError(
      f"{path}: {ROPE_FACTORS!r}: found shape {factors.shape} from "
      f"{factors.min()} on, expected {plain.shape} from 1 on"
    )
  given = [] if original is None else [original]
  for length in (*given, *_lengths(factors, plain)):
    factor = _factor(factors, plain, length)
    scaling = Llama3(factor=factor, original=length, **BANDS)
    meant = plain / scaling.frequencies(theta, dim, None)[0]
    if np.allclose(factors, meant, rtol=1e-5):
      return scaling
  raise UserError(
    f"{path}: {ROPE_FACTORS!r} is not Llama 3's scaling: no length and "
    "factor give these divisors with its bands, 1 and 4; expected that, or a "
    "file without the tensor"
  )


def _share(plain: np.ndarray, length: int) -> np.ndarray:
  """Returns how much of each frequency Llama 3's scaling leaves, 0 to 1."""
  low, high = BANDS["low"], BANDS["high"]
  turns = length * plain / (2 * math.pi)
  return np.clip((turns - low) / (high - low), 0, 1)


def _factor(factors: np.ndarray, plain: np.ndarray, length: int) -> float:
  """Returns the factor, as the lowest frequency implies it: 1 if none does."""
  left = float(_share(plain, length)[-1])
  rest = 1 / float(factors[-1]) - left
  if left == 1 or rest <= 0:
    return 1.0
  factor = (1 - left) / rest
  short = float(f"{factor:.6g}")
  # Divisors are float32; what made them mostly has few digits.
  return short if math.isclose(factor, short, rel_tol=2**-22) else factor


def _lengths(factors: np.ndarray, plain: np.ndarray) -> Iterator[int]:
  """Yields lengths that the divisors may be of, the likeliest first.

  With what is left of frequencies, `r = (L p / 2 pi - low) / (high - low)`, a
  divisor `d` has `1 / d = (1 - r) / factor + r`.
  """
  low, high = BANDS["low"], BANDS["high"]
  most = float(factors.max())
  between = (factors > 1.0001) & (factors < 0.9999 * most)
  if between.any():
    # Of the largest divisor as the factor.
    left = (1 / factors[between] - 1 / most) / (1 - 1 / most)
    turns = left * (high - low) + low
    yield round(float(np.median(turns * 2 * math.pi / plain[between])))
  changed = np.flatnonzero(factors > 1.0001)
  if len(changed) > 1:
    # Both unknown, of the two divisors that are surest on the ramp.
    slope, start = np.polyfit(plain[changed[:2]], 1 / factors[changed[:2]], 1)
    inverse = (start * (high - low) + low) / high
    if slope > 0 and 0 < inverse < 1:
      yield round(2 * math.pi * slope * (high - low) / (1 - inverse))
  # None lies on the ramp: it is anywhere between those that are next to it.
  kept = factors <= 1.0001
  least = 2 * math.pi * high / plain[kept].min() if kept.any() else 1.0
  top = math.inf if kept.all() else 2 * math.pi * low / plain[~kept].max()
  yield _LENGTH
  yield from (2**k for k in range(32) if least <= 2**k <= top)
  if math.ceil(least) <= top:
    yield math.ceil(least)
