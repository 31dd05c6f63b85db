"""The training state: one pytree, with the trainable part set apart by path."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research import tree
from research.optim.low_rank.layerwise import Layerwise, movable
from research.typing import Array, Params, UserError

_FIXED = re.compile(r"(^|/)fixed/")
"""Paths of what adapters do not learn."""

Placement = Callable[[Any], Any]
"""A tree of arrays, or of shapes -> a sharding for each of them."""


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
    held: parameters that only rewrites change, None elsewhere: a base that
      adapters are merged into. No gradient and no optimizer state, but in
      every checkpoint; None if there are none.
  """

  step: Any
  trainable: Any
  frozen: Any
  opt_state: Any
  ema: Any = None
  held: Any = None

  @property
  def params(self) -> Params:
    """The whole parameter tree."""
    moving = self.trainable
    if self.held is not None:
      moving = tree.combine(moving, self.held)
    return tree.combine(moving, self.frozen)


def create(
  params: Params,
  trainable: str,
  tx: optax.GradientTransformation,
  *,
  dtype: Any = jnp.float32,
  average: bool = False,
  held: str | None = None,
  shardings: Placement | None = None,
) -> TrainState:
  """Returns the state at step 0.

  Args:
    params: any tree of weights. Its trainable arrays are copied, since a step
      donates (destroys) the state that it gets; the frozen ones are shared.
    trainable: regular expression, searched for in each array's path.
    tx: the optimizer.
    dtype: of the trainable arrays. They are masters in float32 over a base of
      any type; activations decide in which type they are multiplied. Weights
      that a `Layerwise` optimizer trains as codes (`int8_weights`) keep their
      types.
    average: whether to keep a moving average of the trainable arrays.
    held: regular expression of the paths, among those that are not trainable,
      that rewrites change; they are copied, in their own type.
    shardings: of the state, by its shapes; None off a mesh. Optimizer state is
      made where it stays; the frozen arrays stay as they are, see `place`.

  Raises:
    UserError: nothing is trainable or held, or something that is not floating
      point.
  """
  selected, frozen = tree.partition(params, trainable)
  codes = isinstance(tx, Layerwise)
  _check("trainable", selected, params, trainable, codes)
  if average and any(map(movable, jax.tree.leaves(selected, is_leaf=movable))):
    raise UserError("average: weights in codes have no average, expected False")
  kept = None
  if held is not None:
    kept, frozen = tree.partition(frozen, held)
    _check("held", kept, params, held, codes=False)

  def copy(x: Array) -> Array:
    coded = not jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.array(x, dtype=None if coded else dtype, copy=True)

  def make(selected: Params, kept: Params | None) -> TrainState:
    masters = jax.tree.map(copy, selected)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      trainable=masters,
      frozen=None,
      opt_state=tx.init(masters),
      ema=jax.tree.map(copy, selected) if average else None,
      held=jax.tree.map(lambda x: jnp.array(x, copy=True), kept),
    )

  if shardings is not None:
    where = shardings(jax.eval_shape(make, selected, kept))
    made = jax.jit(make, out_shardings=where)(selected, kept)
  else:
    made = make(selected, kept)
  return dataclasses.replace(made, frozen=frozen)


def shard_params(params: Params, shardings: Placement) -> Params:
  """Returns `params` on the devices where they belong, one copy of each part.

  Args:
    params: arrays that every process has whole, or that are in place already.
    shardings: where they belong, by their shapes.
  """

  def one(x: Any, where: jax.sharding.Sharding) -> Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return x if x.sharding == where else jax.device_put(x, where)
    if where.is_fully_addressable:
      return jax.device_put(x, where)
    # Values of several processes are equal; device_put would compare them.
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, where, lambda i: host[i])

  return jax.tree.map(one, params, shardings(params))


def _check(
  field: str, selected: Params, params: Params, pattern: str, codes: bool
) -> None:
  """Raises UserError where nothing is selected, or what cannot be learned.

  Args:
    field: that `pattern` is of.
    selected: what it selects.
    params: of what.
    pattern: regular expression.
    codes: whether weights can be stored anew as codes.
  """
  found = tree.flatten_paths(selected)
  if not found:
    paths = [path for path, _ in tree.flatten_paths(params)]
    raise UserError(
      f"{field}: {pattern!r} matches none of {len(paths)} parameters.\n"
      f"Expected a regular expression for paths such as {paths[-1]!r}."
    )
  leaves, _ = jax.tree_util.tree_flatten_with_path(
    selected, movable if codes else None
  )
  for path, leaf in ((tree.path_name(p), x) for p, x in leaves):
    anew = codes and movable(leaf)
    # Places of a sparse adapter, say, are no codes of a weight.
    kept = field == "held" and _FIXED.search(path)
    if not (anew or kept or jnp.issubdtype(leaf.dtype, jnp.floating)):
      raise UserError(
        f"{field}: {pattern!r} matches {path} of type {leaf.dtype}.\n"
        "Expected floating point; packed weights stay frozen: name the"
        " adapters, e.g. '/trained/'\n(layerwise.galore alone trains codes,"
        " those of int8_weights)."
      )
