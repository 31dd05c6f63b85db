"""EVA in full: ranks go where inputs need more directions.

Paischer et al. 2024 (arXiv:2410.07170), section 3.2. Adapters keep their scale,
so alpha moves with the rank.
"""

import dataclasses
import re
from typing import Any, Literal

import jax
import numpy as np

from research.lora.adapt import Adapt
from research.lora.init_stats import CalibrationData, InputPCA
from research.lora.methods import eva
from research.lora.methods.eva import EVA
from research.typing import Params, PRNGKey, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptEVA:
  """Adds EVA's adapters, `adapt.method.rank` of rank on average.

  Attributes:
    adapt: what is adapted; its method is EVA, its `look` is not used.
    reading: the data.
    rho: a rank is at most so many times the average one.
    form: 'padded', all factors have `rho` times the average rank, what a
      matrix does not use of it is zero and, having no gradient, stays so:
      layers remain equal and one scanned run. 'split', each matrix has its own
      rank and those of rank 0 no adapter, as PEFT has it: smaller, but layers
      of other ranks are compiled one by one.
  """

  adapt: Adapt
  reading: CalibrationData
  rho: float = 2.0
  form: Literal["padded", "split"] = "padded"

  def __post_init__(self):
    if not isinstance(self.adapt.method, EVA) or self.adapt.rank_pattern:
      raise UserError(
        "AdaptEVA.adapt: expected the method EVA and no rank_pattern."
      )
    if not self.rho >= 1:
      raise UserError(f"AdaptEVA.rho: found {self.rho}, expected at least 1.")

  def of(self, loaded: Any) -> "AdaptEVA":
    """Returns itself, looking at `loaded.model`."""
    return dataclasses.replace(self, reading=self.reading.of(loaded))

  def __call__(self, params: Params, key: PRNGKey) -> dict[str, Any]:
    """Returns `params` with fresh adapters.

    Raises:
      UserError: stacked experts are adapted; or a plan, which has no data,
        asks for ranks.
    """
    addresses = list(self.adapt.methods(params))
    most = round(self.adapt.method.rank * self.rho)
    looked = InputPCA(reading=self.reading, count=most)
    found = looked.explained(params, addresses)
    shares = {address: share for address, (_, share) in found.items()}
    if any(share.ndim > 1 for share in shares.values()):
      raise UserError(
        "AdaptEVA: experts of a stack share one rank.\nUse Adapt with the look"
        " init_stats.InputPCA, or leave experts out of the targets."
      )
    directions = {address: x for address, (x, _) in found.items()}
    ranks = dict.fromkeys(addresses, most)
    if not any(isinstance(x, jax.core.Tracer) for x in shares.values()):
      ranks = eva.ranks(shares, self.adapt.method.rank)
    elif self.form == "split":
      raise UserError(
        "AdaptEVA.form: ranks depend on data, which a plan does not read.\n"
        "Plan with form = 'padded'."
      )
    make = {"padded": self._padded, "split": self._split}[self.form]
    return make(ranks, directions, most)(params, key)

  def _padded(self, ranks, directions, most) -> Adapt:
    used = {
      address: x * (np.arange(most) < ranks[address])[:, None]
      for address, x in directions.items()
    }
    method = dataclasses.replace(
      self.adapt.method, rank=most, alpha=self._alpha(most)
    )
    return dataclasses.replace(self.adapt, method=method, look=lambda *_: used)

  def _split(self, ranks, directions, most) -> Adapt:
    names = {re.escape(address): r for address, r in ranks.items()}
    return dataclasses.replace(
      self.adapt,
      exclude=(*self.adapt.exclude, *(k for k, r in names.items() if not r)),
      rank_pattern={k: r for k, r in names.items() if r},
      alpha_pattern={k: self._alpha(r) for k, r in names.items() if r},
      look=lambda *_: directions,
    )

  def _alpha(self, rank: int) -> float:
    """Returns the alpha that gives `rank` the method's scale."""
    method = self.adapt.method
    share = rank / method.rank
    return method.alpha * (share**0.5 if method.rslora else share)
