"""EVA: a starts as the directions that a matrix's inputs use most.

Paischer et al. 2024 (arXiv:2410.07170). Ranks move to the layers whose inputs
need more directions: `ranks` says how, for `Adapt.rank_pattern`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from research.lora.methods.lora import LoRA
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EVA(LoRA):
  """`seen` is the inputs' right singular vectors `[at least r, in]`."""

  PEFT: ClassVar = None

  def start(self, key, place, w, seen=None):
    if seen is None:
      raise UserError(
        "EVA: needs the inputs' principal directions; give Adapt.init_stats"
      )
    trained, _ = super().start(key, place, w)
    return {"a": seen[: self.rank], "b": trained["b"]}, {}

  def exported(self, p):
    return self.plain(), p


def ranks(explained: Mapping[str, Any], rank: int) -> dict[str, int]:
  """Returns each matrix's rank: the best directions of all, `rank` on average.

  Args:
    explained: by address, `[directions]`: the share of the inputs' variance
      that each explains, in falling order.
    rank: average; 0 is a possible result for a matrix.
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
