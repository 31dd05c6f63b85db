"""Converts adapters of any method to plain LoRA by truncated SVD.

PEFT's `convert_to_lora` (research/lora/MATH.md 8), for every method. It
decomposes the update of the given base, so a method that multiplies its base
(DoRA, HiRA, rotations) converts too, for that base only.
"""

import dataclasses
from typing import Any

import numpy as np

from research import progress, weights
from research.lora import lora_factors, wrap
from research.lora.adapted import AdaptedTensor
from research.lora.lora_factors import Factors
from research.ranges import PositiveInt, PositiveShare, Ranged
from research.typing import Params, UserError


@dataclasses.dataclass(frozen=True)
class Rank(Ranged):
  """Truncation to a fixed rank, or to the full rank of smaller matrices."""

  rank: PositiveInt

  def rank_of(self, s: np.ndarray) -> int:
    """Returns how many of the singular values `[..., k]` to keep."""
    return min(self.rank, s.shape[-1])


@dataclasses.dataclass(frozen=True)
class Energy(Ranged):
  """Truncation to the smallest rank with `share` of the squared norm."""

  share: PositiveShare

  def rank_of(self, s: np.ndarray) -> int:
    """Returns how many of the singular values `[..., k]` to keep."""
    sums = np.cumsum(s.astype(np.float64) ** 2, axis=-1)
    short = (sums < self.share * sums[..., -1:]).sum(-1)
    return min(int(short.max()) + 1, s.shape[-1])


@dataclasses.dataclass(frozen=True)
class Fit:
  """Result of converting one matrix.

  Attributes:
    error: Frobenius norm of the truncated part over that of the update.
  """

  rank: int
  error: float


def to_lora(
  params: Params, size: Rank | Energy
) -> tuple[dict[str, Any], dict[str, Fit]]:
  """Returns the tree with plain LoRA in place of its adapters, and the errors.

  b includes the scale, so alpha equals the rank. Biases that an adapter scales
  are merged.

  Returns:
    (parameters, address -> `Fit`).

  Raises:
    UserError: there is no adapter.
  """
  factors: dict[str, Factors] = {}
  fits = {}
  adapters = lora_factors.adapters(params)
  for address, t in progress.track(adapters.items(), "factoring updates"):
    triple = thin_svd_of(address, t)
    if triple is None:
      triple = np.linalg.svd(lora_factors.update(t), full_matrices=False)
    s = triple[1].astype(np.float64)
    rank, total = size.rank_of(s), float((s**2).sum())
    rest = float((s[..., rank:] ** 2).sum())
    factors[address] = lora_factors.truncate(triple, rank)
    fits[address] = Fit(rank, (rest / total) ** 0.5 if total else 0.0)
  if not factors:
    raise UserError("these parameters hold no adapter")
  base = wrap.disable(wrap.merge_biases(params))
  return lora_factors.wrap_factors(base, factors), fits


def thin_svd_of(address: str, t: AdaptedTensor) -> lora_factors.Triple | None:
  """Returns the singular value decomposition (u, s, v) of plain LoRA's update.

  It has as many values as the rank, in fp64. None for other methods, and for
  two adapters on one weight.

  Args:
    t: an adapter in NumPy, as of `lora_factors.adapters`.
  """
  if weights.is_adapter(t.w):
    return None
  thin = lora_factors.lora_factors_of(address, t)
  if thin is None:
    return None
  u, s, v = lora_factors.thin_svd(thin.a, thin.b)
  return u, s * thin.scale, v
