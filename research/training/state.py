"""The training state: a pytree with trainable and frozen parameters."""

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
"""Paths of adapter arrays that are not trained."""

Placement = Callable[[Any], Any]
"""Maps a tree of arrays or shapes to a tree of shardings."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """The state that a training step reads and updates.

  Attributes:
    step: number of updates done, int32 scalar. An array, not a Python int,
      since multi-process checkpoints contain global arrays only.
    trainable: the trained parameters, None elsewhere.
    frozen: the frozen parameters, None elsewhere. They have no gradient and no
      optimizer state, are never donated, and are not in step checkpoints.
    opt_state: the optax state, for `trainable` only.
    ema: exponential moving average of `trainable`, or None.
    transformed: parameters that only state transforms change, None elsewhere:
      for example a base model that adapters are merged into. They have no
      gradient and no optimizer state, but are in every checkpoint. None if
      there are none.
  """

  step: Any
  trainable: Any
  frozen: Any
  opt_state: Any
  ema: Any = None
  transformed: Any = None

  @property
  def params(self) -> Params:
    moving = self.trainable
    if self.transformed is not None:
      moving = tree.combine(moving, self.transformed)
    return tree.combine(moving, self.frozen)


def create(
  params: Params,
  trainable: str,
  tx: optax.GradientTransformation,
  *,
  dtype: Any = jnp.float32,
  average: bool = False,
  transformed: str | None = None,
  shardings: Placement | None = None,
) -> TrainState:
  """Creates the training state at step 0.

  Args:
    params: any tree of weights. Its trainable arrays are copied, since a step
      donates its input state; the frozen ones are shared.
    trainable: regular expression, searched for in each array's path.
    dtype: dtype of the trainable arrays. By default they are fp32 master
      weights, for a base of any dtype; the dtype of activations is the compute
      dtype. Weights that a `Layerwise` optimizer trains as codes
      (`int8_weights`) keep their dtypes.
    average: whether to keep a moving average of the trainable arrays.
    transformed: regular expression of the non-trainable paths that state
      transforms change; they are copied, in their own dtype.
    shardings: maps the state's shapes to shardings; None without a mesh.
      Optimizer state is created sharded. Frozen arrays are left as they are,
      see `shard_params`.

  Raises:
    UserError: a pattern matches nothing, or something that is not floating
      point.
  """
  selected, frozen = tree.partition(params, trainable)
  codes = isinstance(tx, Layerwise)
  _check("trainable", selected, params, trainable, codes)
  if average and any(map(movable, jax.tree.leaves(selected, is_leaf=movable))):
    raise UserError("average: weights in codes have no average, expected False")
  changing = None
  if transformed is not None:
    changing, frozen = tree.partition(frozen, transformed)
    _check("transformed", changing, params, transformed, codes=False)

  def copy(x: Array) -> Array:
    coded = not jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.array(x, dtype=None if coded else dtype, copy=True)

  def make(selected: Params, changing: Params | None) -> TrainState:
    masters = jax.tree.map(copy, selected)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      trainable=masters,
      frozen=None,
      opt_state=tx.init(masters),
      ema=jax.tree.map(copy, selected) if average else None,
      transformed=jax.tree.map(lambda x: jnp.array(x, copy=True), changing),
    )

  if shardings is not None:
    where = shardings(jax.eval_shape(make, selected, changing))
    made = jax.jit(make, out_shardings=where)(selected, changing)
  else:
    made = make(selected, changing)
  return dataclasses.replace(made, frozen=frozen)


def shard_params(params: Params, shardings: Placement) -> Params:
  """Moves parameters to devices according to `shardings`.

  Args:
    params: arrays that every process holds completely, or global arrays.
  """

  def one(x: Any, where: jax.sharding.Sharding) -> Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return x if x.sharding == where else jax.device_put(x, where)
    if where.is_fully_addressable:
      return jax.device_put(x, where)
    # All processes have equal values, which device_put would compare.
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, where, lambda i: host[i])

  return jax.tree.map(one, params, shardings(params))


def _check(
  field: str, selected: Params, params: Params, pattern: str, codes: bool
) -> None:
  """Raises UserError if nothing, or something not trainable, is selected."""
  selected_arrays = tree.flatten_paths(selected)
  if not selected_arrays:
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
    # Fixed integers of an adapter, such as sparse indices, may be transformed.
    fixed = field == "transformed" and _FIXED.search(path)
    if not (anew or fixed or jnp.issubdtype(leaf.dtype, jnp.floating)):
      raise UserError(
        f"{field}: {pattern!r} matches {path} of type {leaf.dtype}.\n"
        "Expected floating point; packed weights stay frozen: name the"
        " adapters, e.g. '/trained/'\n(only layerwise.galore trains codes,"
        " those of int8_weights)."
      )
