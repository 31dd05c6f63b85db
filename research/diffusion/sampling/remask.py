"""ReMDM: places that were filled are masked again, so that mistakes are mended.

Wang et al. 2025 (arXiv:2503.00307): from time t to s < t a filled place is
masked again with probability `sigma`, and a masked one is filled more often in
turn, so that the marginals stay those of the process. Any `sigma` up to
`Schedule.largest_sigma` will do; what it is, is said by a `Remask`. Commands
define flags from its fields: JAX is imported when they are used.
"""

import dataclasses
from typing import Any, Literal

from research.errors import UserError
from research.ranges import Ranged, Share

Kind = Literal["cap", "rescale", "confidence"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remask(Ranged):
  """How likely filled places are masked again.

  Attributes:
    kind: `"cap"`: sigma is `eta`, `"rescale"`: `eta` of its largest value,
      either way of each filled place alike; `"confidence"`: that much a place
      on average, more where the model was less sure of what it filled in.
    eta: see `kind`.
    start, stop: times between which places may be masked again.
  """

  kind: Kind = "cap"
  eta: Share
  start: float = 1.0
  stop: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.stop <= self.start <= 1:
      raise UserError(
        f"Remask: start is {self.start} and stop {self.stop}, expected"
        " 0 <= stop <= start <= 1: time runs from 1, all masked, to 0"
      )

  def size(self, schedule: Any, t: Any, s: Any) -> Any:
    """Returns sigma from t to s, of a place on average; scalars."""
    import jax.numpy as jnp

    most = schedule.largest_sigma(t, s)
    size = (
      jnp.minimum(self.eta, most) if self.kind == "cap" else self.eta * most
    )
    return jnp.where((t <= self.start) & (t > self.stop), size, 0.0)

  def sigma(
    self, schedule: Any, t: Any, s: Any, confidence: Any, filled: Any
  ) -> Any:
    """Returns how likely each place is masked again, `[B, K]`.

    Args:
      schedule: of the process, a `Schedule`.
      t, s: times before and after the step, scalars.
      confidence: how probable a place's token was when it was filled in,
        `[B, K]`.
      filled: which places may be masked again, `[B, K]`.
    """
    import jax
    import jax.numpy as jnp

    size = jnp.broadcast_to(self.size(schedule, t, s), confidence.shape)
    if self.kind == "confidence":
      share = jax.nn.softmax(jnp.where(filled, -confidence, -jnp.inf), axis=-1)
      share = jnp.where(filled.any(-1, keepdims=True), share, 0.0)
      count = filled.sum(-1, keepdims=True)
      most = schedule.largest_sigma(t, s)
      size = jnp.minimum(size * share * count, most)
    return jnp.where(filled, size, 0.0)

  def fills(self, schedule: Any, t: Any, s: Any) -> Any:
    """Returns how likely a masked place is filled in turn; scalars.

    By confidence masked places have no sigma, as in the authors' code: more
    are then masked than the process has it.
    """
    size = self.size(schedule, t, s)
    size = 0 * size if self.kind == "confidence" else size
    return schedule.transition_probabilities(t, s, size)[0]
