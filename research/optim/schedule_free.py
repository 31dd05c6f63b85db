"""Schedule-free AdamW, and how a run ends with its average.

Defazio et al. 2024 (arXiv:2405.15682), as optax has it. Gradients are taken at
y, between the fast iterate z and its average x; the training state holds y.
The average is what generalises: `finish` puts it in place after the last step.
What is evaluated before that is y, nine tenths of which are x.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from research import ranges
from research.optim import optim
from research.typing import Array, UserError

Metrics = dict[str, Array]


def adamw(
  learning_rate: optim.Number | optim.Schedule,
  *,
  b1: optim.Number = 0.9,
  b2: optim.Number = 0.999,
  eps: optim.Number = 1e-8,
  weight_decay: optim.Number = 0.0,
  decayed: str = ".*",
  clip: optim.Number | None = 1.0,
) -> optax.GradientTransformationExtraArgs:
  """Returns schedule-free AdamW.

  Args:
    learning_rate: a number, or `optim.constant` with its warm-up.
    b1: share of the average in y; it takes the place of Adam's mean.
    b2: decay of the mean square.
    eps: added to the root of the mean square.
    weight_decay: share of a parameter taken off at rate 1.
    decayed: regular expression of the paths that decay.
    clip: bound of the gradient's global norm, or None.
  """
  ranges.check("optimizer", ranges.Decay, b1=b1)
  inner = optim.adamw(
    learning_rate,
    b1=0.0,
    b2=b2,
    eps=eps,
    weight_decay=weight_decay,
    decayed=decayed,
    clip=clip,
  )

  def rate(count):
    # optax counts updates from 1 here, our schedules from 0.
    if not callable(learning_rate):
      return jnp.asarray(learning_rate, jnp.float32)
    return learning_rate(count - 1)

  return contrib.schedule_free(inner, rate, b1=b1)


def averages(opt_state: Any, params: Any) -> Any:
  """Returns the average x of a schedule-free optimizer.

  Args:
    opt_state: its state, wherever in it that is.
    params: the trainable parameters, y.

  Raises:
    UserError: the optimizer is not schedule-free.
  """
  return contrib.schedule_free_eval_params(_found(opt_state), params)


def finish(
  steps: int,
) -> Callable[[Any, Metrics], tuple[Any, Metrics]]:
  """Returns a rewrite of a `TrainState` that ends a run at its average.

  z moves there too, so that a longer run could go on from it.

  Args:
    steps: of the whole run.
  """

  def after(state: Any, metrics: Metrics) -> tuple[Any, Metrics]:
    inner = _found(state.opt_state)
    x = averages(state.opt_state, state.trainable)
    last = state.step == steps

    def chosen(new, old):
      return jax.tree.map(
        lambda a, b: jnp.where(last, a.astype(b.dtype), b), new, old
      )

    moved = inner._replace(z=chosen(x, inner.z))
    opt_state = jax.tree.map(
      lambda leaf: moved if _is_state(leaf) else leaf,
      state.opt_state,
      is_leaf=_is_state,
    )
    trainable = chosen(x, state.trainable)
    return (
      dataclasses.replace(state, trainable=trainable, opt_state=opt_state),
      metrics,
    )

  return after


def _is_state(x: Any) -> bool:
  return isinstance(x, contrib.ScheduleFreeState)


def _found(opt_state: Any) -> contrib.ScheduleFreeState:
  found = jax.tree.leaves(opt_state, is_leaf=_is_state)
  for x in found:
    if _is_state(x):
      return x
  raise UserError(
    "schedule_free: the optimizer keeps no average.\n"
    "Expected schedule_free.adamw as the experiment's optimizer."
  )
