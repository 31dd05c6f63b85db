"""What `experiments.quantize` is configured by, and does."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax

from experiments.core import cli
from experiments.core.experiment import NeedsModel, Source, Transform
from research.interop.loaded import Loaded
from research.quant.reports import Report
from research.typing import Params

Say = Callable[[str], None]


@runtime_checkable
class Reporting(Protocol):
  """A transform that says what became of the weights."""

  def run(self, params: Params, say: Say) -> tuple[Params, Report]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """A model to be quantized.

  Attributes:
    model: where it comes from.
    transforms: rewrites of its weights, in order.
    seed: of their random numbers.
  """

  model: Source
  transforms: tuple[Transform, ...]
  seed: int = 0

  def run(self, say: Say) -> tuple[Loaded, dict[str, Any], list[Report]]:
    """Returns the model as it was, its new weights, and what was reported."""
    cli.loading(self.model)
    loaded = self.model.load()
    params, reports = loaded.params, []
    key = jax.random.key(self.seed)
    for i, transform in enumerate(self.transforms):
      if isinstance(transform, NeedsModel):
        transform = transform.with_model(loaded)
      if isinstance(transform, Reporting):
        params, report = transform.run(params, say)
        reports.append(report)
      else:
        params = transform(params, jax.random.fold_in(key, i))
    return loaded, dict(params), reports
