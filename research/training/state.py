"""The training state: one pytree, with the trainable part set apart by path."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research import tree
from research.typing import Array, Params, UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a step reads, and all that it changes but `frozen`.

  Attributes:
    step: updates done, int32 scalar. An array, not a host number, since
      checkpoints of many processes hold global arrays only.
    trainable: the parameters that are learned, None elsewhere.
    frozen: all others, None where `trainable` has an array. No gradient, no
      optimizer state, never donated, not in the run's step checkpoints.
    opt_state: optax's, over `trainable` alone.
    ema: moving average of `trainable`, or None.
  """

  step: Any
  trainable: Any
  frozen: Any
  opt_state: Any
  ema: Any = None

  @property
  def params(self) -> Params:
    """The whole parameter tree."""
    return tree.combine(self.trainable, self.frozen)


def create(
  params: Params,
  trainable: str,
  tx: optax.GradientTransformation,
  *,
  dtype: Any = jnp.float32,
  average: bool = False,
) -> TrainState:
  """Returns the state at step 0.

  Args:
    params: any tree of weights. Its trainable arrays are copied, since a step
      donates (destroys) the state that it gets; the frozen ones are shared.
    trainable: regular expression, searched for in each array's path.
    tx: the optimizer.
    dtype: of the trainable arrays. They are masters in float32 over a base of
      any type; activations decide in which type they are multiplied.
    average: whether to keep a moving average of the trainable arrays.

  Raises:
    UserError: nothing is trainable, or something that is not floating point.
  """
  selected, frozen = tree.partition(params, trainable)
  _check(selected, params, trainable)

  def copy(x: Array) -> Array:
    return jnp.array(x, dtype=dtype, copy=True)

  selected = jax.tree.map(copy, selected)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    trainable=selected,
    frozen=frozen,
    opt_state=tx.init(selected),
    ema=jax.tree.map(copy, selected) if average else None,
  )


def _check(selected: Params, params: Params, pattern: str) -> None:
  found = tree.flatten_paths(selected)
  if not found:
    paths = [path for path, _ in tree.flatten_paths(params)]
    raise UserError(
      f"trainable: {pattern!r} matches none of {len(paths)} parameters.\n"
      f"Expected a regular expression for paths such as {paths[-1]!r}."
    )
  for path, leaf in found:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise UserError(
        f"trainable: {pattern!r} matches {path} of type {leaf.dtype}.\n"
        "Expected floating point; packed weights stay frozen: name the"
        " adapters, e.g. '/(a|b)$'."
      )
