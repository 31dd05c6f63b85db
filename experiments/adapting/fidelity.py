"""The operation that measures what merging an adapter would lose."""

import dataclasses
from typing import Any

from experiments.adapting.operation import ComparesLogits, ReadsAdapters
from experiments.converting import rounding
from experiments.converting.rounding import Rounding
from experiments.core import cli
from experiments.core.choices import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fidelity(ComparesLogits, ReadsAdapters):
  """How much of weights and logits merging into --dtype would lose."""

  dtype: str | None = option(
    None, "Type of merged weights; by default the base's own."
  )
  rounding: Rounding = option("nearest", "Rounding of merged weights.")
  seed: int = option(0, "Seed of stochastic rounding.", needs="rounding")

  def run(self) -> dict[str, Any]:
    from research.lora.merge import changes, merge

    text = None if self.text is None else cli.read_text(self.text, "text")
    source = self.open(self.only)
    params = source.params()
    how = rounding.make(self.rounding, self.seed)
    merged, losses = merge.merge(params, how, self.dtype)
    result = self.summary(
      {path: dataclasses.asdict(c) for path, c in losses.items()},
      least_kept=min(c.kept for c in losses.values()),
      **changes.merge_summary(losses.values()),
    )
    if text is None:
      return result
    tokens = self.read_tokens(text, source, self.only)
    compared = merge.logit_change(source.model, params, merged, tokens)
    return result | dict(outputs=dataclasses.asdict(compared))
