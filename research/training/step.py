"""One update, and one evaluation, as pure functions.

Read `make_train_step`; the loop compiles what it returns. The gradient is that
of (sum of losses) / (sum of weights) over the whole batch, however many
microbatches it is cut into and however unevenly they are masked.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research import sharding, tree
from research.training.objective import Batch, Objective
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

  Metrics are float32: `loss` and the objective's own (means over the batch's
  weight; whatever is no scalar is for a rewrite of the state to use up),
  `weight`, `grad_norm` before clipping, `learning_rate` if the optimizer has
  one, and `nonfinite`, 1 where loss or gradient is not finite. `step` derives
  its randomness as `fold_in(key, state.step)`.

  Args:
    objective: the loss.
    tx: the optimizer, over `state.trainable`.
    accumulate: microbatches, one after the other; they divide the batch.
    average: decay of the moving average, if the state keeps one.
  """

  def step(state: TrainState, batch: Batch, key: PRNGKey):
    key = jax.random.fold_in(key, state.step)
    grads, loss_sum, weight, sums = _gradients(
      objective, state, batch, key, accumulate
    )
    weight_or_one = jnp.where(weight > 0, weight, 1)
    grads = jax.tree.map(lambda g: g / weight_or_one, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    ema = state.ema
    if ema is not None:
      ema = optax.incremental_update(trainable, ema, 1 - average)
    means = {
      k: v / weight_or_one for k, v in {"loss": loss_sum, **sums}.items()
    }
    metrics = {**means, "weight": weight, "grad_norm": optax.tree.norm(grads)}
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    metrics["nonfinite"] = 1.0 - finite
    rate = optax.tree.get(opt_state, "learning_rate")
    if rate is not None:
      metrics["learning_rate"] = rate
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


def _gradients(objective, state, batch, key, accumulate):
  """Returns sums over the batch: gradients, loss, weight, metrics."""

  def loss(trainable, batch, key):
    params = dataclasses.replace(state, trainable=trainable).params
    loss_sum, weight, sums = objective(params, batch, key)
    return loss_sum, (weight, sums)

  def one(batch, key):
    (loss_sum, (weight, sums)), grads = jax.value_and_grad(loss, has_aux=True)(
      state.trainable, batch, key
    )
    return grads, loss_sum, weight, sums

  if accumulate == 1:
    return one(batch, key)

  def add(total, numbered):
    index, part = numbered
    found = one(part, jax.random.fold_in(key, index))
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, found), None

  parts = _microbatches(batch, accumulate)
  first = jax.tree.map(lambda x: x[0], parts)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)),
    jax.eval_shape(one, first, key),
  )
  numbers = jnp.arange(accumulate)
  return jax.lax.scan(add, zeros, (numbers, parts))[0]


def _microbatches(batch: Batch, count: int) -> Any:
  def cut(path, x):
    if x.shape[0] % count:
      raise UserError(
        f"accumulate: {count} microbatches do not divide batch {path!r} of"
        f" {x.shape[0]} rows.\nExpected a divisor of the batch size."
      )
    x = x.reshape(count, x.shape[0] // count, *x.shape[1:])
    # Each microbatch over the whole mesh, not each device a microbatch.
    rest = ("length",) * (x.ndim > 2) + (None,) * (x.ndim - 3)
    return sharding.constrain(x, None, "batch", *rest)

  return tree.map_paths(cut, dict(batch))


def make_eval_step(objective: Objective) -> EvalStep:
  """Returns a pure `step(state, batch)` -> sums: `loss`, `weight`, metrics."""

  def step(state: TrainState, batch: Batch) -> Metrics:
    loss_sum, weight, sums = objective(state.params, batch, None)
    return {"loss": loss_sum, "weight": weight, **sums}

  return step
