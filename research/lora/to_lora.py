"""Any method as plain LoRA, of a rank or of a share of its energy.

PEFT's `convert_to_lora` (lora.md section 7), for every method: what an adapter
adds to this base is decomposed, so one that multiplies its base (DoRA, HiRA,
rotations) can be converted too, for this base.
"""

import dataclasses
from typing import Any

import numpy as np

from research import weights
from research.lora import lora_factors, wrap
from research.lora.lora_factors import Factors
from research.typing import Params, UserError


@dataclasses.dataclass(frozen=True)
class Rank:
  """So many singular triples of every matrix, or all there are."""

  rank: int

  def __post_init__(self) -> None:
    if self.rank < 1:
      raise UserError(f"rank is {self.rank}, expected at least 1")

  def of(self, s: np.ndarray) -> int:
    """Returns how many of the singular values `[..., k]` are kept."""
    return min(self.rank, s.shape[-1])


@dataclasses.dataclass(frozen=True)
class Energy:
  """The fewest triples that hold this share of the squared Frobenius norm."""

  share: float

  def __post_init__(self) -> None:
    if not 0 < self.share <= 1:
      raise UserError(f"energy is {self.share}, expected above 0, at most 1")

  def of(self, s: np.ndarray) -> int:
    """Returns how many of the singular values `[..., k]` are kept."""
    sums = np.cumsum(s.astype(np.float64) ** 2, axis=-1)
    short = (sums < self.share * sums[..., -1:]).sum(-1)
    return min(int(short.max()) + 1, s.shape[-1])


@dataclasses.dataclass(frozen=True)
class Fit:
  """One matrix.

  Attributes:
    rank: that was kept.
    error: norm of what was left out over the norm of the update.
  """

  rank: int
  error: float


def to_lora(
  params: Params, size: Rank | Energy
) -> tuple[dict[str, Any], dict[str, Fit]]:
  """Returns the tree with plain LoRA in place of its adapters, and the errors.

  Scales are in b, so alpha is the rank. A bias that an adapter scales is the
  base's no more: the tree has it as it is merged.

  Args:
    params: with adapters of any method, on any base.
    size: how much of each update is kept.

  Raises:
    UserError: there is no adapter.
  """
  found: dict[str, Factors] = {}
  fits = {}
  for address, t in lora_factors.adapters(params).items():
    triple = _decomposed(address, t)
    s = triple[1].astype(np.float64)
    rank, total = size.of(s), float((s**2).sum())
    rest = float((s[..., rank:] ** 2).sum())
    found[address] = lora_factors.truncated(triple, rank)
    fits[address] = Fit(rank, (rest / total) ** 0.5 if total else 0.0)
  if not found:
    raise UserError("these parameters hold no adapter")
  base = wrap.disable(wrap.merge_biases(params))
  return lora_factors.wrapped(base, found), fits


def _decomposed(address, t):
  if not weights.is_adapter(t.w):  # an adapter under this one
    thin = lora_factors.plain(address, t)
    if thin is not None:
      u, s, v = lora_factors.decomposed(thin.a, thin.b)
      return u, s * thin.scale, v
  return np.linalg.svd(lora_factors.update(t), full_matrices=False)
