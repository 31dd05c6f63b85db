"""The training step and the evaluation step, as pure functions.

Start with `make_train_step`; the loop compiles the function that it returns.
The gradient is that of (sum of losses) / (sum of weights) over the whole batch,
for any number of microbatches and however unevenly they are masked. Optimizers
that project gradients (`Compressing`) accumulate projected gradients;
`Layerwise` ones never materialise all gradients or updates at once. Parameters
that the objective bounds (`Constrained`) end each step within their bounds.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research import sharding, tree
from research.optim import optim
from research.optim.low_rank.compressing import Compressing
from research.optim.low_rank.layerwise import Layerwise
from research.training.objectives.objective import (
  PER_ROW,
  Batch,
  Constrained,
  Objective,
  WholeBatch,
)
from research.training.state import TrainState
from research.typing import Array, PRNGKey, UserError

Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Batch, PRNGKey], tuple[TrainState, Metrics]]
EvalStep = Callable[[TrainState, Batch], Metrics]


def make_train_step(
  objective: Objective,
  tx: optax.GradientTransformation,
  accumulate: int = 1,
  average: float = 0.999,
) -> TrainStep:
  """Returns a pure `step(state, batch, key) -> (state, metrics)`.

  Metrics are float32:

  * `loss` and the objective's own, means over the batch's weight. Non-scalar
    ones are input for state transforms, which must consume them.
  * `weight`, the batch's weight.
  * `tokens`, those that are no padding, if the batch has `segments`.
  * `grad_norm`, before clipping; of projected gradients if the optimizer
    accumulates those or is `Layerwise`.
  * `learning_rate`, if the optimizer has one, or `learning_rate/GROUP` of each
    group (`by_path`).
  * `nonfinite`, 1 if loss or gradient norm is not finite.
  * `misread`, for `Layerwise` optimizers, see there.

  The step's randomness derives from `fold_in(key, state.step)`.

  Args:
    accumulate: number of microbatches for gradient accumulation; must divide
      the batch.
    average: decay of the exponential moving average, if the state has one.
  """

  if accumulate > 1 and isinstance(objective, WholeBatch):
    raise UserError(
      f"accumulate: found {accumulate} microbatches, expected 1:"
      f" {type(objective).__name__} compares each row of a batch with all"
      " others. Use more devices, or a smaller batch."
    )

  def step(state: TrainState, batch: Batch, key: PRNGKey):
    key = jax.random.fold_in(key, state.step)
    (grads, loss_sum, weight, sums), opt_state = _gradients(
      objective, state, batch, key, accumulate, tx
    )
    weight_or_one = jnp.where(weight > 0, weight, 1)
    grads = jax.tree.map(lambda g: g / weight_or_one, grads)
    trainable, opt_state = _moved(
      tx, accumulate, grads, opt_state, state.trainable
    )
    if isinstance(objective, Constrained):
      trainable = objective.constrain(trainable)
    ema = state.ema
    if ema is not None:
      ema = optax.incremental_update(trainable, ema, 1 - average)
    means = {
      k: v / weight_or_one for k, v in {"loss": loss_sum, **sums}.items()
    }
    metrics = {**means, "weight": weight, "grad_norm": optax.tree.norm(grads)}
    if "segments" in batch:
      metrics["tokens"] = (batch["segments"] >= 0).sum()
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    metrics["nonfinite"] = 1.0 - finite
    metrics |= optim.learning_rates(opt_state)
    metrics = {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}
    state = dataclasses.replace(
      state,
      step=state.step + 1,
      trainable=trainable,
      opt_state=opt_state,
      ema=ema,
    )
    return state, metrics

  return step


def _adds_small(tx: optax.GradientTransformation, accumulate: int) -> bool:
  return accumulate > 1 and isinstance(tx, Compressing)


def _moved(tx, accumulate, grads, opt_state, trainable):
  if isinstance(tx, Layerwise):
    return tx.move(grads, opt_state, trainable)
  apply = tx.apply if _adds_small(tx, accumulate) else tx.update
  updates, opt_state = apply(grads, opt_state, trainable)
  return optax.apply_updates(trainable, updates), opt_state


def _gradients(objective, state, batch, key, accumulate, tx):
  """Returns sums over the batch, and the optimizer state.

  The sums are those of the (possibly projected) gradients, the loss, the
  weight, and the metrics.
  """

  def loss(trainable, batch, key, watch=lambda params: params):
    params = watch(dataclasses.replace(state, trainable=trainable).params)
    loss_sum, weight, sums = objective(params, batch, key)
    return loss_sum, (weight, sums)

  layerwise, small = isinstance(tx, Layerwise), _adds_small(tx, accumulate)

  def gradients(opt_state, first, last, batch, key):
    """Returns the optimizer state, whether it is settled, and sums.

    Args:
      first: whether no microbatch before this one had a gradient.
      last: whether none follows. Others without a gradient, as where all is
        masked, have no directions to settle projectors with.
    """
    if layerwise:
      (loss_sum, (weight, sums)), grads, fresh, misread = tx.gradients(
        lambda x, watch: loss(x, batch, key, watch),
        state.trainable,
        opt_state,
        first,
      )
      settles = first & (last | _any_nonzero(grads))
      opt_state = jax.tree.map(
        lambda new, old: jnp.where(settles, new, old), fresh, opt_state
      )
      # Weighted, because metrics are divided by the weight later.
      sums = {**sums, "misread": misread * weight}
      return opt_state, settles, (grads, loss_sum, weight, sums)
    (loss_sum, (weight, sums)), grads = jax.value_and_grad(loss, has_aux=True)(
      state.trainable, batch, key
    )
    settles = False
    if small:
      settles = first & (last | _any_nonzero(grads))
      opt_state = jax.lax.cond(
        settles, tx.prepare, lambda _, same: same, grads, opt_state
      )
      grads = tx.compress(grads, opt_state)
    return opt_state, settles, (grads, loss_sum, weight, sums)

  if accumulate == 1:
    opt_state, _, total = gradients(state.opt_state, True, True, batch, key)
    return total, opt_state

  def add(carry, numbered):
    (opt_state, settled, total), (index, part) = carry, numbered
    last = index == accumulate - 1
    opt_state, settles, part_total = gradients(
      opt_state, ~settled, last, part, jax.random.fold_in(key, index)
    )
    total = jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, part_total)
    return (opt_state, settled | settles, total), None

  parts = _microbatches(batch, accumulate)
  first = jax.tree.map(lambda x: x[0], parts)
  # Keep an unchanging optimizer state out of the loop's carry.
  changes = small or layerwise
  opt_state = state.opt_state if changes else None
  shapes = jax.eval_shape(
    lambda *x: gradients(opt_state, True, True, *x)[2], first, key
  )
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)),
    shapes,
  )
  start = opt_state, jnp.array(False), zeros
  (opt_state, _, total), _ = jax.lax.scan(
    add, start, (jnp.arange(accumulate), parts)
  )
  return total, opt_state if changes else state.opt_state


def _any_nonzero(grads: Any) -> Array:
  # A mask of `x != 0` would take memory, unlike a maximum.
  largest = [jnp.abs(x).max(initial=0) for x in jax.tree.leaves(grads)]
  return (jnp.array(largest) != 0).any()


def _microbatches(batch: Batch, count: int) -> Any:
  def cut(path, x):
    if x.shape[0] % count:
      raise UserError(
        f"accumulate: {count} microbatches do not divide batch {path!r} of"
        f" {x.shape[0]} rows.\nExpected a divisor of the batch size."
      )
    x = x.reshape(count, x.shape[0] // count, *x.shape[1:])
    # Shard each microbatch over the whole mesh, not one microbatch per device.
    second = None if path in PER_ROW else "length"
    rest = (second,) * (x.ndim > 2) + (None,) * (x.ndim - 3)
    return sharding.constrain(x, None, "batch", *rest)

  return tree.map_paths(cut, dict(batch))


def make_eval_step(objective: Objective) -> EvalStep:
  """Returns a pure `step(state, batch)` -> sums of loss, weight, metrics."""

  def step(state: TrainState, batch: Batch) -> Metrics:
    loss_sum, weight, sums = objective(state.params, batch, None)
    return {"loss": loss_sum, "weight": weight, **sums}

  return step
