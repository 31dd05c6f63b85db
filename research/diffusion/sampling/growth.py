"""When a canvas is too short for an answer, see `sampling.canvas`."""

import dataclasses

import jax
import jax.numpy as jnp

from research.diffusion.sampling.candidates import Options
from research.typing import Array, Bool, Float, Int, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
  """When a canvas grows, and by how much; the defaults are the authors'.

  Attributes:
    start: places at first (the paper's L_init).
    by: masks that are added at the end, or that a place becomes (E_factor).
    window: places that are asked whether they are an end (W_eos).
    begin: `readiness` from which the canvas is long enough to begin (tau_eos).
    ready: `readiness` from which nothing is inserted (tau_expand).
    low: candidates less likely than this are in doubt (tau_low).
    ends: ends put behind the canvas where it is long enough to begin: not in
      the paper, but in its code, half a window.
  """

  start: int = 64
  by: int = 8
  window: int = 32
  begin: float = 0.5
  ready: float = 0.9
  low: float = 0.1
  ends: int = 16

  def __post_init__(self):
    least = dict(start=1, by=2, window=1, ends=0)
    for name, low in least.items():
      if getattr(self, name) < low:
        raise UserError(
          f"Growth: {name} is {getattr(self, name)}, expected at least {low}"
        )
    for name in ("begin", "ready", "low"):
      if not 0 <= getattr(self, name) <= 1:
        raise UserError(
          f"Growth: {name} is {getattr(self, name)}, expected 0 to 1"
        )

  def check(self, options: Options) -> None:
    """Raises UserError where options and a canvas that grows do not agree."""
    if self.start > options.length:
      raise UserError(
        f"Growth: start is {self.start}, more than the longest canvas, length "
        f"{options.length}; lower start"
      )
    if not options.end:
      raise UserError(
        "Growth: end is empty, so that no canvas is ever long enough; name "
        "the tokens that end a text"
      )
    if options.steps is not None or options.plan != "even":
      raise UserError(
        f"Growth: steps is {options.steps} and plan {options.plan}, but how "
        "many places there will be is not known before; leave both out"
      )
    if options.edit is not None:
      raise UserError(
        f"Growth: edit is {options.edit}, expected None: a place that is "
        "filled stays what it is"
      )


def readiness(
  logits: Float[Array, "B M V"],
  tokens: Int[Array, "B M"],
  masked: Bool[Array, "B M"],
  own: Bool[Array, "B M"],
  options: Options,
  window: int,
) -> Float[Array, "B"]:
  """Returns how sure the model is that canvases end where they do, 0 to 1.

  The mean probability of the last `window` places that would be an end, of as
  many as there are, the missing ones counted as 0. What is filled already is
  what it is: a model's logits of places that it sees mean nothing (the authors
  use them all the same).

  Args:
    logits: of canvases, with room to grow.
    tokens: in them.
    masked: what is still to be filled.
    own: False for the room to grow.
    options: with the mask and the ends.
    window: W.
  """
  logits = logits.astype(jnp.float32).at[..., options.mask_id].set(-jnp.inf)
  likeliest = jnp.where(masked, jnp.argmax(logits, axis=-1), tokens)
  sure = jnp.exp(logits.max(-1) - jax.nn.logsumexp(logits, axis=-1))
  ends = jnp.isin(likeliest, jnp.array(options.end)) & own
  last = jnp.cumsum(ends[:, ::-1], axis=-1)[:, ::-1] <= window
  counted = jnp.where(masked, sure, 1.0)
  return jnp.where(ends & last, counted, 0.0).sum(-1) / window
