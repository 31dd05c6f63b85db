"""How adapters are combined, by PEFT's names: data for `arithmetic`.

A combination has three parts: what is summed (whole updates, or the factors A
and B one by one, which gets the products between adapters wrong), what is kept
of each before (TIES: Yadav et al. 2023, arXiv:2306.01708, its largest entries;
DARE: Yu et al. 2023, arXiv:2311.03099, random ones), and whether entries
against the majority's sign count.
"""

import dataclasses
from typing import Literal

Elect = Literal["total", "frequency"]
"""How a sign is elected: by the sum of the entries, or by their number."""


@dataclasses.dataclass(frozen=True)
class Combination:
  """How adapters are combined.

  Attributes:
    of: what is summed: the whole update, which is decomposed again; each
      factor; or nothing, since factors are concatenated, which is exact.
    keep: all of an adapter, its largest entries, or random ones.
    signs: whether only entries of the elected sign are averaged.
  """

  of: Literal["concatenation", "factors", "update"]
  keep: Literal["all", "largest", "random"] = "all"
  signs: Literal["any", "majority"] = "any"

  @property
  def options(self) -> frozenset[str]:
    """Names of `add_weighted`'s options that have an effect on it."""
    used = {
      "rank": self.of == "update",
      "density": self.keep != "all",
      "elect": self.signs == "majority",
      "key": self.keep == "random",
    }
    return frozenset(name for name, is_used in used.items() if is_used)


COMBINATIONS = {
  "cat": Combination("concatenation"),
  "svd": Combination("update"),
  "linear": Combination("factors"),
  "ties": Combination("factors", "largest", "majority"),
  "ties_svd": Combination("update", "largest", "majority"),
  "dare_linear": Combination("factors", "random"),
  "dare_linear_svd": Combination("update", "random"),
  "dare_ties": Combination("factors", "random", "majority"),
  "dare_ties_svd": Combination("update", "random", "majority"),
  "magnitude_prune": Combination("factors", "largest"),
  "magnitude_prune_svd": Combination("update", "largest"),
}
"""By PEFT's names."""
