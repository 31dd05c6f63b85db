"""Operations on what an adapter did to its matrices: ranks and intruders."""

import dataclasses
from typing import Any

from experiments.adapting.operation import ReadsAdapters, WritesAdapter
from experiments.core.choices import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class FindsIntruders:
  """Which singular vectors count as intruders."""

  top: int = option(10, "Leading singular vectors that are examined.")
  threshold: float = option(
    0.5, "Largest cosine of an intruder with any of the base's vectors."
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnose(FindsIntruders, ReadsAdapters):
  """Size, ranks, angles and intruders of each update: of an adapter, or of full
  training from --base.
  """

  energy: float = option(
    0.9, "Share of an update's squared norm that its energy rank keeps."
  )
  picture: str | None = option(None, "A PNG to draw.")

  def run(self) -> dict[str, Any]:
    import numpy as np

    from research.interop import sources
    from research.lora.diagnosis import diagnose, plot_diagnosis

    if self.base is None or self.only.endswith(".gguf"):
      params = self.open(self.only).params()
      diagnoses = diagnose.diagnose(params, self.top, self.energy)
    else:
      models = (sources.open_source(x).params() for x in (self.base, self.only))
      diagnoses = diagnose.diagnose_change(*models, self.top, self.energy)
    if self.picture is not None:
      plot_diagnosis.draw(diagnoses, self.picture, self.only)
    rows = {
      path: dataclasses.asdict(d) | dict(intruders=d.intruders(self.threshold))
      for path, d in diagnoses.items()
    }
    names = ("relative", "stable_rank", "energy_rank", "intruders")
    means = {k: float(np.mean([r[k] for r in rows.values()])) for k in names}
    return self.summary(rows, means=means, picture=self.picture)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeakenIntruders(FindsIntruders, WritesAdapter):
  """The adapter with its intruder dimensions (see diagnose) scaled down."""

  strength: float = option(
    0.75, "The factor of an intruder dimension, from 0 to 1."
  )

  def make(self) -> tuple[Any, Any, dict[str, Any]]:
    from research.lora import lora_factors, wrap
    from research.lora.diagnosis import diagnose

    source = self.open(self.only)
    params = source.params()
    found, counts = diagnose.mitigate(
      params, self.top, self.threshold, self.strength
    )
    rows = {path: dict(intruders=n) for path, n in counts.items()}
    result = self.summary(rows, intruders=sum(counts.values()))
    return (
      source,
      lora_factors.wrap_factors(wrap.disable(params), found),
      result,
    )
