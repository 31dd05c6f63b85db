"""ReMDM: places that were filled are masked again, so that mistakes are mended.

Wang et al. 2025 (arXiv:2503.00307): from time t to s < t a filled place is
masked again with probability `sigma`, and a masked one is filled more often in
turn, so that the marginals stay those of the process. Any `sigma` up to
`largest_sigma` will do; what it is, is said by a `Remask`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from research.diffusion.schedule import Schedule
from research.typing import Array, Bool, Float, UserError

Kind = Literal["cap", "rescale", "confidence"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remask:
  """How likely filled places are masked again.

  Attributes:
    kind: `"cap"`: sigma is `eta`, `"rescale"`: `eta` of its largest value,
      either way of each filled place alike; `"confidence"`: that much a place
      on average, more where the model was less sure of what it filled in.
    eta: see `kind`.
    start, stop: times between which places may be masked again.
  """

  kind: Kind = "cap"
  eta: float
  start: float = 1.0
  stop: float = 0.0

  def __post_init__(self):
    if not 0 <= self.eta <= 1:
      raise UserError(f"Remask: eta is {self.eta}, expected 0 to 1")
    if not 0 <= self.stop <= self.start <= 1:
      raise UserError(
        f"Remask: start is {self.start} and stop {self.stop}, expected"
        " 0 <= stop <= start <= 1: time runs from 1, all masked, to 0"
      )

  def size(
    self, schedule: Schedule, t: Float[Array, ""], s: Float[Array, ""]
  ) -> Float[Array, ""]:
    """Returns sigma from t to s, of a place on average."""
    most = largest_sigma(schedule, t, s)
    size = (
      jnp.minimum(self.eta, most) if self.kind == "cap" else self.eta * most
    )
    return jnp.where((t <= self.start) & (t > self.stop), size, 0.0)

  def sigma(
    self,
    schedule: Schedule,
    t: Float[Array, ""],
    s: Float[Array, ""],
    confidence: Float[Array, "B K"],
    filled: Bool[Array, "B K"],
  ) -> Float[Array, "B K"]:
    """Returns how likely each place is masked again.

    Args:
      schedule: of the process.
      t, s: times before and after the step.
      confidence: how probable a place's token was when it was filled in.
      filled: which places may be masked again.
    """
    size = jnp.broadcast_to(self.size(schedule, t, s), confidence.shape)
    if self.kind == "confidence":
      share = jax.nn.softmax(jnp.where(filled, -confidence, -jnp.inf), axis=-1)
      share = jnp.where(filled.any(-1, keepdims=True), share, 0.0)
      count = filled.sum(-1, keepdims=True)
      most = largest_sigma(schedule, t, s)
      size = jnp.minimum(size * share * count, most)
    return jnp.where(filled, size, 0.0)

  def fills(
    self, schedule: Schedule, t: Float[Array, ""], s: Float[Array, ""]
  ) -> Float[Array, ""]:
    """Returns how likely a masked place is filled in turn.

    By confidence masked places have no sigma, as in the authors' code: more
    are then masked than the process has it.
    """
    size = self.size(schedule, t, s)
    size = jnp.zeros_like(size) if self.kind == "confidence" else size
    return transition_probabilities(schedule, t, s, size)[0]


def largest_sigma(
  schedule: Schedule, t: Float[Array, ""], s: Float[Array, ""]
) -> Float[Array, ""]:
  """Returns the most that may be masked again, `(1 - alpha_s) / alpha_t`."""
  alpha = schedule.alpha(t)
  most = schedule.masked(s) / jnp.maximum(alpha, 1e-12)
  return jnp.where(alpha > 0, jnp.minimum(1.0, most), 1.0)


def transition_probabilities(
  schedule: Schedule,
  t: Float[Array, ""],
  s: Float[Array, ""],
  sigma: Float[Array, "*B"],
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
  """Returns (filled, masked): what becomes of a masked place from t to s."""
  fill = schedule.alpha(s) - (1 - sigma) * schedule.alpha(t)
  fill = jnp.clip(fill / schedule.masked(t), 0, 1)
  return fill, 1 - fill
