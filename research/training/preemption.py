"""Being asked to leave: SIGTERM, in one process of many or in the only one.

Schedulers send it some seconds before they kill. JAX's coordination service
tells every process, and all agree on the step after which they save; it takes
`jax.distributed.initialize`, for a single process, too.
"""

from jax.experimental import multihost_utils

from research.typing import UserError


class Preempted(UserError):
  """The run has been saved and ended early, since it was asked to."""

  exit_status = 42
  """What a command ends with, so that a launcher starts it again."""


def reached(step: int) -> bool:
  """Whether all processes, having done `step`, shall save and end now.

  Every process asks after every step. False where JAX is not distributed, or
  its preemption service is off.

  Args:
    step: updates done so far.
  """
  try:
    return multihost_utils.reached_preemption_sync_point(step)
  except RuntimeError:  # the service is off
    return False
