"""Optimizers and schedules: optax chains as plain functions of numbers.

A schedule is a function of the number of updates done; `adamw` takes a number
or a schedule, and keeps the rate it last used in its state, where the training
step finds it as `learning_rate`.

Optax does the work but for two things, which `test_optim.py` compares: its
warm-up subtracts from the peak, so that first rates are off by some 1e-5, and
`optax.inject_hyperparams`, which would keep the rate, saves it elsewhere, under
a name that is there twice, and in the parameters' type.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research import ranges, tree
from research.typing import Array, UserError

Number = float | int
Schedule = Callable[[Array], Any]
"""Updates done -> rate."""


def constant(peak: Number, warmup: int = 0) -> Schedule:
  """Returns a schedule: linear warm-up, then `peak`."""
  return _warmed(peak, warmup, optax.constant_schedule(peak))


def cosine(
  peak: Number, steps: int, warmup: int = 0, final: Number = 0.1
) -> Schedule:
  """Returns a schedule: warm-up, then half a cosine to `final * peak`."""
  ranges.check("schedule", ranges.NonNegativeFloat, final=final)
  decay = optax.cosine_decay_schedule(peak, _rest(steps, warmup), final)
  return _warmed(peak, warmup, decay)


def linear(
  peak: Number, steps: int, warmup: int = 0, final: Number = 0.0
) -> Schedule:
  """Returns a schedule: warm-up, then a line to `final * peak`."""
  ranges.check("schedule", ranges.NonNegativeFloat, final=final)
  decay = optax.linear_schedule(peak, final * peak, _rest(steps, warmup))
  return _warmed(peak, warmup, decay)


def rsqrt(peak: Number, warmup: int = 0, timescale: int = 10_000) -> Schedule:
  """Returns a schedule without an end: warm-up, then one over a root.

  `peak / sqrt(1 + n / timescale)` at n steps after the warm-up, as big_vision
  has it (Zhai et al. 2022, arXiv:2106.04560, section 3.5).

  Args:
    peak: the highest rate.
    warmup: steps of linear warm-up.
    timescale: steps after which the rate is `peak / sqrt(2)`.
  """
  ranges.check("schedule", ranges.PositiveFloat, timescale=timescale)

  def decay(count):
    return peak / jnp.sqrt(1 + jnp.maximum(count, 0) / timescale)

  return _warmed(peak, warmup, decay)


def wsd(
  peak: Number, steps: int, warmup: int = 0, decay: int = 0, final: Number = 0.0
) -> Schedule:
  """Returns a schedule: warm-up, `peak`, a line down over the last steps.

  Hu et al. 2024 (MiniCPM, arXiv:2404.06395), section 4.2.

  Args:
    peak: the highest rate.
    steps: of the whole run.
    warmup: steps of linear warm-up.
    decay: steps of the line down, at the end.
    final: the last rate, as a share of `peak`.
  """
  ranges.check(
    "schedule", ranges.NonNegativeFloat, warmup=warmup, decay=decay, final=final
  )
  _rest(steps, warmup + decay)
  down = optax.linear_schedule(peak, final * peak, max(decay, 1))
  flat = optax.constant_schedule(peak)
  after = steps - decay - warmup
  return _warmed(peak, warmup, optax.join_schedules([flat, down], [after]))


def _warmed(peak: Number, warmup: int, then: Schedule) -> Schedule:
  ranges.check("schedule", ranges.NonNegativeFloat, peak=peak, warmup=warmup)
  if not warmup:
    return then

  def schedule(count):
    # The first update already moves: its rate is peak / warmup, not 0.
    up = peak * (count + 1) / warmup
    return jnp.where(count < warmup, up, then(count - warmup))

  return schedule


def _rest(steps: int, taken: int) -> int:
  if steps <= taken:
    raise UserError(
      f"schedule: {taken} steps of warm-up and decay in a run of {steps}.\n"
      "Expected more steps than that; lower warmup or decay, or raise steps."
    )
  return steps - taken


class RateState(NamedTuple):
  """Updates done, and the rate of the last one."""

  count: Array
  learning_rate: Array


def scale_by_rate(rate: Number | Schedule) -> optax.GradientTransformation:
  """Returns a transformation by `-rate(count)` that remembers the rate."""
  ranges.check("optimizer", ranges.NonNegativeFloat, learning_rate=rate)

  def at(count):
    value = rate(count) if callable(rate) else rate
    return jnp.asarray(value, jnp.float32)

  def init(params):
    del params
    count = jnp.zeros((), jnp.int32)
    return RateState(count, at(count))

  def update(updates, state, params=None):
    del params
    now = at(state.count)
    scaled = jax.tree.map(lambda u: (-now * u).astype(u.dtype), updates)
    return scaled, RateState(optax.safe_increment(state.count), now)

  return optax.GradientTransformation(init, update)


def learning_rates(opt_state: Any) -> dict[str, Array]:
  """Returns the rates that an optimizer last used, by the metric's name.

  Args:
    opt_state: of any optimizer: `learning_rate`, if it has one, and
      `learning_rate/GROUP` for each that has, if there are groups (`by_path`).
  """
  found = optax.tree.get_all_with_path(opt_state, "learning_rate")
  if len(found) == 1:
    return {"learning_rate": found[0][1]}
  return {f"learning_rate/{_group(path)}": rate for path, rate in found}


def _group(path: Any) -> str:
  """Returns the names on the way to a part of an optimizer's state."""
  keys = (x for x in path if isinstance(x, jax.tree_util.DictKey))
  return "/".join(str(key.key) for key in keys)


def adamw(
  learning_rate: Number | Schedule,
  *,
  b1: Number = 0.9,
  b2: Number = 0.999,
  eps: Number = 1e-8,
  weight_decay: Number = 0.0,
  decayed: str = ".*",
  clip: Number | None = 1.0,
) -> optax.GradientTransformation:
  """Returns AdamW: clip, moments, decoupled decay, rate.

  Loshchilov & Hutter 2019 (arXiv:1711.05101), algorithm 2; the decay is
  multiplied by the scheduled rate, as in optax and torch.

  Args:
    learning_rate: a number, or a schedule of the updates done.
    b1: decay of the mean.
    b2: decay of the mean square.
    eps: added to the root of the mean square.
    weight_decay: share of a parameter taken off at rate 1.
    decayed: regular expression, searched for in the paths that decay, e.g.
      `"/trained/"`, or `"^(?!.*(norm|bias))"` for all but norms and biases.
    clip: bound of the gradient's global norm, or None.
  """
  parts = [] if clip is None else [clipped(clip)]
  parts.append(moments(b1, b2, eps))
  if weight_decay:
    parts.append(decaying(weight_decay, decay_mask(decayed)))
  return optax.chain(*parts, scale_by_rate(learning_rate))


def moments(b1: Number, b2: Number, eps: Number) -> Any:
  """Returns `optax.scale_by_adam`, its numbers checked."""
  ranges.check("optimizer", ranges.Decay, b1=b1, b2=b2)
  ranges.check("optimizer", ranges.NonNegativeFloat, eps=eps)
  return optax.scale_by_adam(b1, b2, eps)


def clipped(norm: Number | None) -> optax.GradientTransformation:
  """Returns `optax.clip_by_global_norm`, or nothing's identity."""
  ranges.check("optimizer", ranges.PositiveFloat, clip=norm)
  return optax.identity() if norm is None else optax.clip_by_global_norm(norm)


def decaying(weight_decay: Number, mask: Any = None) -> Any:
  """Returns `optax.add_decayed_weights`, its number checked."""
  ranges.check("optimizer", ranges.NonNegativeFloat, weight_decay=weight_decay)
  return optax.add_decayed_weights(weight_decay, mask)


def decay_mask(pattern: str) -> Callable:
  """Returns `mask(params)`: whether `pattern` is found in each path."""

  def mask(params):
    return tree.map_paths(
      lambda path, _: re.search(pattern, path) is not None, params
    )

  return mask
