"""Optimizers whose gradients can be added up in a smaller form.

Where a batch is cut into microbatches, their gradients are added up. An
optimizer that sees a gradient only through a linear map, such as GaLore's
projection, lets the training step add up what the map gives: the sum never has
the size of the parameters. The map may change from step to step; it is settled
by the first microbatch's gradient that is not all zeros, before anything is
added.
"""

from collections.abc import Callable
from typing import Any

import optax

Updates = Any
State = Any


class Compressing(optax.GradientTransformation):
  """A gradient transformation in three parts, which `update` does in a row.

  Attributes:
    prepare: (gradient, state) -> state, which settles the map of this step.
    compress: (gradient, state) -> small; linear in the gradient.
    apply: (small, state, params) -> (updates, state).
  """

  prepare: Callable[[Updates, State], State]
  compress: Callable[[Updates, State], Any]
  apply: Callable[[Any, State, Any], tuple[Updates, State]]

  def __new__(
    cls, init: Callable, prepare: Callable, compress: Callable, apply: Callable
  ) -> "Compressing":
    def update(updates, state, params=None):
      state = prepare(updates, state)
      return apply(compress(updates, state), state, params)

    made = super().__new__(cls, init, update)
    made.prepare, made.compress, made.apply = prepare, compress, apply
    return made


def followed_by(
  first: Compressing, rest: optax.GradientTransformation
) -> Compressing:
  """Returns `optax.chain(first, rest)` that can still compress."""

  def init(params):
    return first.init(params), rest.init(params)

  def prepare(updates, state):
    return first.prepare(updates, state[0]), state[1]

  def compress(updates, state):
    return first.compress(updates, state[0])

  def apply(small, state, params=None):
    updates, one = first.apply(small, state[0], params)
    updates, two = rest.update(updates, state[1], params)
    return updates, (one, two)

  return Compressing(init, prepare, compress, apply)
