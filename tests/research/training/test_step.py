"""Training steps: sums, gradients, and untouched parameters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import tree
from research.data import packing, pipeline
from research.optim import optim
from research.training import state, step
from research.training.objectives.objective import NextToken
from research.typing import UserError

ADAPTERS = r"/trained/"


def batch_of(documents, length, plan=packing.concatenate, rows=4):
  packed = packing.pack(documents, length, plan)
  return pipeline.in_order(packed, rows)


def sums_and_gradients(objective, start):
  def loss(trainable, frozen, batch):
    total, weight, sums = objective(
      tree.combine(trainable, frozen), batch, None
    )
    return total, (weight, sums)

  grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
  return lambda batches: jax.tree.map(
    lambda *x: sum(x),
    *[grad(start.trainable, start.frozen, b) for b in batches],
  )


@pytest.fixture(scope="module")
def sgd():
  return optax.sgd(0.1)


@pytest.fixture(scope="module")
def start(adapted, sgd):
  return state.create(adapted, ADAPTERS, sgd)


@pytest.mark.slow
def test_packed_equals_unpacked(objective, start, documents):
  total = sums_and_gradients(objective, start)
  packed = batch_of(documents, 16, packing.best_fit, rows=5)
  alone = [b for d in documents for b in batch_of([d], 16, rows=5)]
  assert len(packed) == 1 and len(alone) == len(documents)
  # Sums over 54 targets of order 5 in float32, added in another order.
  chex.assert_trees_all_close(total(packed), total(alone), rtol=2e-5, atol=2e-5)


def textbook(model, params, documents):
  """Mean loss from full logits of one document at a time, by hand."""
  total, count = 0.0, 0
  for d in documents:
    hidden, _ = model.apply({"params": params}, jnp.asarray(d[None, :-1]))
    logits = model.apply({"params": params}, hidden, method="logits")[0]
    log_p = jax.nn.log_softmax(logits)
    total -= log_p[jnp.arange(len(d) - 1), d[1:]].sum()
    count += len(d) - 1
  return total / count


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [ADAPTERS, r"^embed$"])
def test_update_is_the_gradient_of_the_mean(
  model, objective, adapted, documents, sgd, trainable
):
  documents = documents[:3]
  start = state.create(adapted, trainable, sgd)

  def truth(part):
    return textbook(model, tree.combine(part, start.frozen), documents)

  want_loss, want = jax.jit(jax.value_and_grad(truth))(start.trainable)
  batch = batch_of(documents, 16, rows=2)[0]
  update = jax.jit(step.make_train_step(objective, sgd))
  after, metrics = update(start, batch, jax.random.key(0))
  got = jax.tree.map(
    lambda a, b: (a - b) / 0.1, start.trainable, after.trainable
  )
  # The difference of two float32 of order 1, over 0.1: 1e-6 absolute.
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=5e-6)
  chex.assert_trees_all_close(metrics["loss"], want_loss, rtol=1e-5)
  norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(want)))
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
  assert int(after.step) == 1


def test_every_step_and_microbatch_has_noise_of_its_own(sgd):
  """Of n equal numbers, n times the sum of squares is the square of the sum."""

  def objective(params, batch, key):
    noise = jax.random.uniform(key)
    sums = {"noise": noise, "square": noise**2}
    return params["a"].sum(), jnp.float32(1), sums

  start = state.create({"a": jnp.ones(3)}, "a", sgd)
  batch = {"tokens": jnp.zeros((4, 2), jnp.int32)}
  found = []
  for parts in (1, 4):
    update = jax.jit(step.make_train_step(objective, sgd, parts))
    after = start
    for _ in range(2):
      after, metrics = update(after, batch, jax.random.key(0))
      found.append(float(metrics["noise"]))
      spread = metrics["square"] - metrics["noise"] ** 2
      assert (parts > 1) == (float(spread) > 1e-4)
  assert len(set(found)) == 4


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.sample(2)
def test_accumulation_equals_the_large_batch(
  objective, start, documents, sgd, parts
):
  batch = batch_of(documents, 16, packing.best_fit, rows=8)[0]
  assert len(set(batch["weights"].sum(1))) > 2  # uneven, and empty rows
  whole, cut = (
    jax.jit(step.make_train_step(objective, sgd, n))(
      start, batch, jax.random.key(0)
    )
    for n in (1, parts)
  )
  chex.assert_trees_all_close(whole, cut, rtol=1e-5, atol=1e-6)


def test_accumulation_must_divide_the_batch(line, sgd):
  objective, params, numbers = line
  start = state.create(params, "w", sgd)
  update = step.make_train_step(objective, sgd, 3)
  with pytest.raises(UserError, match="3 microbatches do not divide"):
    update(start, next(iter(numbers())), jax.random.key(0))


def test_frozen_is_untouched_and_outside_of_the_optimizer(
  objective, adapted, documents
):
  tx = optim.adamw(1e-2, weight_decay=0.1)
  start = state.create(adapted, ADAPTERS, tx)
  thin = tree.count(start.trainable)
  assert thin + tree.count(start.frozen) == tree.count(adapted)
  # Two moments for each trainable number, two counters, one rate.
  assert tree.count(start.opt_state) == 2 * thin + 3
  update = jax.jit(step.make_train_step(objective, tx))
  after, _ = update(start, batch_of(documents, 16)[0], jax.random.key(0))
  chex.assert_trees_all_equal(after.frozen, start.frozen)
  moved = jax.tree.map(
    lambda a, b: bool((a != b).all()), start.trainable, after.trainable
  )
  assert all(jax.tree.leaves(moved))


def test_created_state_shares_no_trainable_buffer(line, sgd):
  _, params, _ = line
  start = state.create(params, "w", sgd, average=True)
  leaves = jax.tree.leaves((params, start.trainable, start.ema))
  where = [x.unsafe_buffer_pointer() for x in leaves]
  assert len(set(where)) == len(where)


def test_dropout_follows_the_step_and_is_off_in_evaluation(
  model, params, adapt, documents, sgd
):
  objective = NextToken(model, rows=8)
  start = state.create(adapt(params, dropout=0.5), ADAPTERS, sgd)
  plain = state.create(adapt(params), ADAPTERS, sgd)
  batch = batch_of(documents, 16)[0]
  update = jax.jit(step.make_train_step(objective, sgd))
  key = jax.random.key(0)
  first, again = update(start, batch, key)[1], update(start, batch, key)[1]
  chex.assert_trees_all_equal(first, again)
  later = jax.tree.map(lambda x: x, start)
  later = state.TrainState(
    later.step + 1, later.trainable, later.frozen, later.opt_state
  )
  assert update(later, batch, key)[1]["loss"] != first["loss"]
  evaluate = jax.jit(step.make_eval_step(objective))
  chex.assert_trees_all_close(
    evaluate(start, batch), evaluate(plain, batch), rtol=1e-6
  )


def test_a_batch_without_targets_changes_nothing(line, sgd):
  objective, params, numbers = line
  start = state.create(params, "w", sgd)
  batch = next(iter(numbers()))
  batch["weights"] = np.zeros_like(batch["weights"])
  update = step.make_train_step(objective, sgd)
  after, metrics = update(start, batch, jax.random.key(0))
  chex.assert_trees_all_equal(after.trainable, start.trainable)
  assert metrics["loss"] == 0 and metrics["nonfinite"] == 0


def test_nonfinite_is_flagged(line, sgd):
  objective, params, numbers = line
  start = state.create(params, "w", sgd)
  batch = next(iter(numbers(bad_from=1)))
  batch["weights"] = np.ones_like(batch["weights"])
  _, metrics = step.make_train_step(objective, sgd)(
    start, batch, jax.random.key(0)
  )
  assert metrics["nonfinite"] == 1


def test_moving_average(line, sgd):
  objective, params, numbers = line
  start = state.create(params, "w", sgd, average=True)
  update = step.make_train_step(objective, sgd, average=0.9)
  after, _ = update(start, next(iter(numbers())), jax.random.key(0))
  want = 0.9 * start.ema["w"] + 0.1 * after.trainable["w"]
  chex.assert_trees_all_close(after.ema["w"], want, rtol=1e-6)


def test_masters_are_float32_over_any_base(line, sgd):
  _, params, _ = line
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  start = state.create(half, "w", sgd)
  assert start.trainable["w"].dtype == jnp.float32
  assert start.frozen["base"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
  "pattern,message",
  [("nothing", "matches none of 2"), ("codes", "of type int8")],
)
def test_what_cannot_be_trained(pattern, message, sgd):
  params = {"codes": jnp.ones(3, jnp.int8), "w": jnp.ones(3)}
  with pytest.raises(UserError, match=message):
    state.create(params, pattern, sgd)
