"""EVA: LoRA with a initialised to the principal components of the inputs.

Paischer et al. 2024 (arXiv:2410.07170). `ranks` redistributes rank to matrices
whose inputs vary in more directions, for `Adapt.rank_pattern`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from research.lora.methods.lora import LoRA
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EVA(LoRA):
  """LoRA whose `stats` are the inputs' components `[at least r, in]`."""

  PEFT: ClassVar = None

  def init_arrays(self, key, spec, w, stats=None):
    if stats is None:
      raise UserError(
        "EVA: needs the inputs' principal directions; give Adapt.init_stats"
      )
    if spec.embedding:  # whose b is random, so that a has to be 0
      raise UserError("EVA: found an embedding, expected a linear layer")
    trained, _ = super().init_arrays(key, spec, w)
    return {"a": stats[: self.rank], "b": trained["b"]}, {}

  def exported(self, p):
    return self.as_lora(), p


def ranks(explained: Mapping[str, Any], rank: int) -> dict[str, int]:
  """Returns address -> rank, from the components that explain most variance.

  Takes the best components of all matrices, `rank` per matrix on average.

  Args:
    explained: address -> shares of the inputs' variance that each component
      explains, descending.
    rank: average rank; a single matrix may get 0.
  """
  pool = [
    (-float(share), path, i)
    for path, shares in explained.items()
    for i, share in enumerate(np.asarray(shares))
  ]
  out = dict.fromkeys(explained, 0)
  for _, path, _ in sorted(pool)[: rank * len(explained)]:
    out[path] += 1
  return out
