"""A rate that falls in mid-run: two flat stages, then a line down."""

import optax

from research import ranges
from research.optim import optim
from research.optim.optim import Number, Schedule
from research.typing import UserError


def stages(
  peak: Number,
  later: Number,
  at: int,
  steps: int,
  warmup: int = 0,
  decay: int = 0,
  final: Number = 0.0,
) -> Schedule:
  """Returns a schedule: warm-up, `peak`, `later`, a line down at the end.

  LLaDA's pre-training (Nie et al. 2025, arXiv:2502.09992): 4e-4, 1e-4 once 1.2
  of its 2.3 T tokens were read, down to 1e-5 over the last 0.3 T.

  Args:
    peak: the first rate.
    later: the second one.
    at: updates before it.
    steps: of the whole run.
    warmup: steps of linear warm-up.
    decay: steps of the line down, at the end.
    final: the last rate, as a share of `later`.

  Raises:
    UserError: a stage has no room.
  """
  ranges.check(
    "stages",
    ranges.NonNegativeFloat,
    peak=peak,
    later=later,
    warmup=warmup,
    decay=decay,
    final=final,
  )
  if not warmup <= at < steps - decay:
    raise UserError(
      f"stages: the second begins at {at}, expected from {warmup}, where"
      f" warm-up ends, to below {steps - decay}, where the line down begins"
    )
  first = optim.constant(peak, warmup)
  second = optim.wsd(later, steps - at, decay=decay, final=final)
  return optax.join_schedules([first, second], [at])
