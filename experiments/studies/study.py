"""A study: arms of an experiment, each at its own best learning rate.

Methods are compared only where each had its rate swept (Zhang et al. 2026,
arXiv:2602.04998). Rates are half-decades, 10^(k/2); the best one is chosen on
validation documents and lies inside the grid, or the grid grows; what is
reported is held out. `population` has the runs.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from experiments.core import from_scratch
from research.lora import wrap
from research.optim import optim
from research.training.aot import StateTransform
from research.typing import UserError

Row = dict[str, Any]
"""What is known of an arm; plain values."""


def adam(schedule: optim.Schedule) -> optax.GradientTransformation:
  """Returns plain Adam."""
  return optim.adamw(schedule, clip=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
  """One way to train.

  Attributes:
    name: of the row.
    transform: of the base's weights, or None.
    look: `init_stats.CalibrationData` -> what `transform` looks with, or None.
    trainable, held: as in `experiment.Experiment`.
    optimizer: of a schedule.
    first: k of the first of four rates, which grow from there as needed.
    shape: of the rate over steps, with peak 1; None for the study's.
    rewrites: as in `experiment.Experiment`.
    group: what it belongs to in tables.
  """

  name: str
  transform: Callable[..., Any] | None = None
  look: Callable[..., Any] | None = None
  trainable: str = wrap.TRAINABLE
  held: str | None = None
  optimizer: Callable[..., Any] = adam
  first: int = -7
  shape: Callable[..., Any] | None = None
  rewrites: tuple[StateTransform, ...] = ()
  group: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """Arms that learn one task from one base.

  Attributes:
    model: of the base.
    task: the source that is learned.
    arms: how.
    objective: the loss; the model is put into its field `model`.
    verdicts: rows by arm -> claims, what was found, and whether they hold.
    known: the source that the base knows; None for a fresh base a seed.
    base_steps, base_rate: of the base's own training, batches of 16.
    steps, batch: of every run.
    shape: of the rate over steps, with peak 1.
    seeds: of adapters and of the order of data.
  """

  model: from_scratch.FromScratch
  task: Any
  arms: Sequence[Arm]
  objective: Any
  verdicts: Callable[[Mapping[str, Row]], list[Any]]
  known: Any = None
  base_steps: int = 2000
  base_rate: float = 3e-3
  steps: int = 300
  batch: int = 8
  shape: Callable[..., Any] = optim.constant(1.0)
  seeds: int = 3

  def __post_init__(self):
    names = [arm.name for arm in self.arms]
    for name in names:
      if names.count(name) > 1:
        raise UserError(f"Study.arms: two are called {name!r}.")
