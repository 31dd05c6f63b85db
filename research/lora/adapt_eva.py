"""EVA with rank redistribution: more rank where inputs vary in more directions.

Paischer et al. 2024 (arXiv:2410.07170), section 3.2. Alpha changes with the
rank so that each adapter keeps its scale.
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
from research.ranges import Ranged, Real
from research.typing import Params, PRNGKey, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptEVA(Ranged):
  """Transform that adds EVA adapters of average rank `adapt.method.rank`.

  Attributes:
    adapt: the targets and the method, an EVA; `init_stats` is not used.
    calibration: the data that inputs are measured on.
    rho: largest rank of a matrix, as a multiple of the average rank.
    form: 'padded' gives all factors `rho` times the average rank. Rows beyond
      a matrix's own rank are zero and, having no gradient, stay zero; layers
      remain equal, so one scan runs them all. 'split' gives each matrix its
      own rank, and no adapter at rank 0, as PEFT does: fewer parameters, but
      layers of different ranks compile separately.
  """

  adapt: Adapt
  calibration: CalibrationData
  rho: Real(at_least=1) = 2.0
  form: Literal["padded", "split"] = "padded"

  def __post_init__(self):
    super().__post_init__()
    if not isinstance(self.adapt.method, EVA) or self.adapt.rank_pattern:
      raise UserError(
        "AdaptEVA.adapt: expected the method EVA and no rank_pattern."
      )

  def with_model(self, loaded: Any) -> "AdaptEVA":
    return dataclasses.replace(
      self, calibration=self.calibration.with_model(loaded)
    )

  def __call__(self, params: Params, key: PRNGKey) -> dict[str, Any]:
    """Returns `params` with newly initialised adapters.

    Raises:
      UserError: the targets include stacked experts; or `form` is 'split'
        under `eval_shape`, where no data determine ranks.
    """
    methods = self.adapt.methods(params)
    addresses = list(methods)
    most = round(self.adapt.method.rank * self.rho)
    looked = InputPCA(calibration=self.calibration, count=most)
    components = looked.explained(params, addresses)
    shares = {address: share for address, (_, share) in components.items()}
    if any(share.ndim > 1 for share in shares.values()):
      raise UserError(
        "AdaptEVA: experts of a stack share one rank.\nUse Adapt with"
        " init_stats.InputPCA, or leave experts out of the targets."
      )
    directions = {address: x for address, (x, _) in components.items()}
    ranks = dict.fromkeys(addresses, most)
    if not any(isinstance(x, jax.core.Tracer) for x in shares.values()):
      ranks = eva.ranks(shares, self.adapt.method.rank)
    elif self.form == "split":
      raise UserError(
        "AdaptEVA.form: ranks depend on data, which planning does not read.\n"
        "Plan with form = 'padded'."
      )
    if self.form == "padded":
      return self._padded(ranks, directions, most)(params, key)
    alphas = {address: method.alpha for address, method in methods.items()}
    return self._split(ranks, directions, alphas)(params, key)

  def _padded(self, ranks, directions, most) -> Adapt:
    used = {
      address: x * (np.arange(most) < ranks[address])[:, None]
      for address, x in directions.items()
    }
    adapt, usual = self.adapt, self.adapt.method
    return dataclasses.replace(
      adapt,
      method=dataclasses.replace(
        usual, rank=most, alpha=self._alpha(usual.alpha, most)
      ),
      alpha_pattern={
        k: self._alpha(alpha, most) for k, alpha in adapt.alpha_pattern.items()
      },
      init_stats=lambda *_: used,
    )

  def _split(self, ranks, directions, alphas) -> Adapt:
    names = {re.escape(address): r for address, r in ranks.items()}
    return dataclasses.replace(
      self.adapt,
      exclude=(*self.adapt.exclude, *(k for k, r in names.items() if not r)),
      rank_pattern={k: r for k, r in names.items() if r},
      alpha_pattern={
        re.escape(address): self._alpha(alphas[address], r)
        for address, r in ranks.items()
        if r
      },
      init_stats=lambda *_: directions,
    )

  def _alpha(self, alpha: float, rank: int) -> float:
    method = self.adapt.method
    share = rank / method.rank
    return alpha * (share**0.5 if method.rslora else share)
